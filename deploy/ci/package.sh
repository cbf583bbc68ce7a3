#!/bin/sh
# Build the images and list what is in them; without a Docker engine, say so and list all the same. package.sh [IMAGE...]
set -eu
cd "$(dirname "$0")/../.."
[ $# -gt 0 ] || set -- vit page watch llm-cpu llm-cuda mlflow train
deploy/ci/sbom.sh build/sbom "$@"
if ! docker info > /dev/null 2>&1; then
    echo "There is no Docker engine here: the images are not built."
    exit 0
fi
# the names and the version that deploy/compose and the chart ask for
version=${VERSION:-$(sed -n 's/^version *= *//p' settings.ini)}
registry=${REGISTRY:-registry.hospital.example/cxr}
for image; do
    file=${image%%-*} target=
    case $image in
        page | watch) file=vit ;;
        llm-*) target=${image#llm-} ;;
        train) target=cuda ;;
    esac
    docker build --file "deploy/docker/$file.Dockerfile" --target "$target" --build-arg "LOCK=$image" \
        --tag "$registry/cxr-pred-$image:$version" --tag "$registry/cxr-pred-$image:$(git rev-parse HEAD)" .
done
