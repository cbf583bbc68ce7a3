#!/bin/sh
# Put the image's project into the folder that jobs work in: fill.sh IMAGE FOLDER. DVC wants a git repository, so it becomes one.
# A newer image replaces it, unless somebody has worked in it: then it stays, and this says what to do.
set -eu
image=${1:?the folder of the image} folder=${2:?the folder to work in}
if [ "$(id -u)" = 0 ]; then   # a new volume is root's; nothing but this is done as root
    chown 10001:10001 "$folder"
    exec setpriv --reuid=10001 --regid=10001 --clear-groups --inh-caps=-all "$0" "$image" "$folder"
fi
export HOME=/tmp GIT_CONFIG_NOSYSTEM=1
git() { command git -C "$folder" -c user.name=image -c user.email=image@localhost -c core.hooksPath=/dev/null "$@"; }
new=$(cd "$image" && find . -type f ! -name '*.pyc' ! -path '*.egg-info/*' -exec sha256sum {} + | LC_ALL=C sort -k 2 | sha256sum | cut -d ' ' -f 1)
if [ -e "$folder/.git" ]; then
    [ "$(git log -1 --format=%s delivered)" != "$new" ] || exit 0
    if [ -n "$(git status --porcelain)" ] || [ "$(git rev-parse HEAD)" != "$(git rev-parse delivered)" ]; then
        echo "The image is newer than $folder, in which somebody has worked: it stays as it is. Save the work, undo it (git reset --hard delivered), and start again." >&2
        exit 0
    fi
    git ls-files -z | (cd "$folder" && xargs -0 rm -f)
else git init --quiet; fi
cp -R "$image/." "$folder"
git add --all
git commit --quiet --allow-empty --message "$new"
git tag --force delivered > /dev/null
