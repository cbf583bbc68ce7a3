#!/bin/sh
# The folder of a Hugging Face Space: ./build.sh FOLDER [BUNDLE]. Then: hf upload NAME/cxr_pred FOLDER --repo-type space
set -eu
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
to=${1:?"name the folder to make"}
bundle=${2:-$root/models/release}
[ ! -e "$to" ] || { echo "$to is there already: name a new folder, or delete it." >&2; exit 1; }
[ -f "$bundle/manifest.json" ] || { echo "$bundle is no bundle: it has no manifest.json." >&2; exit 1; }
mkdir -p "$to"
cp "$here/app.py" "$here/README.md" "$to/"
cp "$root/deploy/docker/requirements/page.lock" "$to/requirements.txt"
cp -R "$bundle" "$to/bundle"
(cd "$root" && find cxr_pred -name '*.py') | while IFS= read -r file; do
    mkdir -p "$to/$(dirname "$file")"
    cp "$root/$file" "$to/$file"
done
# files over 10 MB travel by LFS
printf '%s filter=lfs diff=lfs merge=lfs -text\n' '*.onnx' '*.safetensors' > "$to/.gitattributes"
