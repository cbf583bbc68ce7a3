#!/bin/sh
# One CycloneDX bill of materials an image, of all that its Dockerfile installs: sbom.sh FOLDER [IMAGE...]
set -eu
out=$(mkdir -p "${1:-build/sbom}" && cd "${1:-build/sbom}" && pwd)
cd "$(dirname "$0")/../.."
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- vit page watch llm-cpu llm-cuda mlflow train
locks() {
    here=deploy/docker/requirements
    case $1 in
        # the lock of the training image is in two parts, the second of them torch with CUDA
        train) cat $here/train-common.lock $here/train-cuda.lock ;;
        # torch for processors comes from an index of its own, and is in no lock
        llm-cpu) cat $here/llm-cpu.lock; sed -n 's/.*echo "\(torch==[^" ]*+cpu\)".*/\1/p' deploy/docker/llm.Dockerfile ;;
        *) cat "$here/$1.lock" ;;
    esac
}
for image; do
    locks "$image" | "${CYCLONEDX:-.venv-deploy/bin/cyclonedx-py}" requirements --output-reproducible --of JSON -o "$out/$image.cdx.json" -
done
echo "Bills of materials: $out"
