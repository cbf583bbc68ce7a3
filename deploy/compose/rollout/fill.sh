#!/bin/sh
# The image's bundle into the folder of all bundles, by its version's name: fill.sh IMAGE FOLDER. What is there stays; FOLDER/image says which is the image's.
set -eu
image=${1:?the folder of the image} folder=${2:?the folder of all bundles}
umask 022
version=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["version"])' "$image/manifest.json")
case $version in '' | .* | *[!A-Za-z0-9._-]*) echo "The image's bundle calls itself '$version', which is no folder's name." >&2; exit 1 ;; esac
# two bundles may answer alike and differ in a figure of their card
[ ! -e "$folder/$version" ] || cmp -s "$image/manifest.json" "$folder/$version/manifest.json" || version=$version-$(sha256sum "$image/manifest.json" | cut -c 1-8)
if [ ! -e "$folder/$version" ]; then
    rm -rf "$folder/$version.part"   # of a copy that broke off
    cp -R "$image" "$folder/$version.part"
    mv "$folder/$version.part" "$folder/$version"
fi
echo "$folder/$version" > "$folder/image.part"
mv "$folder/image.part" "$folder/image"
