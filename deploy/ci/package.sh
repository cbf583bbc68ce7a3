#!/bin/sh
# Build the images and list what is in them; without a Docker engine, say so and list all the same.
set -eu
cd "$(dirname "$0")/../.."
deploy/ci/sbom.sh build/sbom
if ! docker info > /dev/null 2>&1; then
    echo "There is no Docker engine here: the images are not built."
    exit 0
fi
tag=${VERSION:-$(git rev-parse --short HEAD)}
one() { file=$1 name=$2; shift 2; docker build --file "deploy/docker/$file.Dockerfile" --tag "${REGISTRY:-localhost/cxr}/cxr-pred-$name:$tag" "$@" .; }
one vit vit
one vit page --build-arg LOCK=page
one vit watch --build-arg LOCK=watch
one llm llm-cpu --target cpu
one mlflow mlflow
