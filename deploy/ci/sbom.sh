#!/bin/sh
# One CycloneDX bill of materials an image, of the Python packages that its Dockerfile installs by name: sbom.sh FOLDER [IMAGE...]
# Debian's are in the one that BuildKit attaches (sbom: true). In neither: the base model of the language images, and pip where a venv brings it.
set -eu
out=$(mkdir -p "${1:-build/sbom}" && cd "${1:-build/sbom}" && pwd)
cd "$(dirname "$0")/../.."
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- vit page watch llm-cpu llm-cuda mlflow train
locks() {
    here=deploy/docker/requirements
    case $1 in
        # the lock of the training image is in two parts, the second of them torch with CUDA; what builds its packages stays in it
        train)
            awk 'NR == FNR { if (/^[^ ]+==/) seen[$1] = 1; next } /^[^ #]/ { once = !($1 in seen) } once' $here/train-common.lock $here/build.lock
            cat $here/train-common.lock $here/train-cuda.lock ;;
        # torch for processors comes from an index of its own, and is in no lock
        llm-cpu) cat $here/llm-cpu.lock; sed -n 's/.*echo "\(torch==[^" ]*+cpu\)".*/\1/p' deploy/docker/llm.Dockerfile ;;
        *) cat "$here/$1.lock" ;;
    esac
}
for image; do
    locks "$image" | "${CYCLONEDX:-.venv-deploy/bin/cyclonedx-py}" requirements --output-reproducible --of JSON -o "$out/$image.cdx.json" -
done
echo "Bills of materials: $out"
