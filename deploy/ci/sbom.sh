#!/bin/sh
# One CycloneDX bill of materials an image: sbom.sh FOLDER
set -eu
out=$(mkdir -p "${1:-build/sbom}" && cd "${1:-build/sbom}" && pwd)
cd "$(dirname "$0")/../.."
for image in vit page watch llm-cuda llm-cpu mlflow train-common; do
    .venv-deploy/bin/cyclonedx-py requirements "deploy/docker/requirements/$image.lock" --output-reproducible --of JSON -o "$out/$image.cdx.json"
done
echo "Bills of materials: $out"
