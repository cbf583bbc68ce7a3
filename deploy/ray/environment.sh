#!/bin/sh
# The environment that Ray's machines share, .venv-ray: the training image's locked packages, Ray among them, and the project. In the folder that all
# of them see: deploy/ray/environment.sh. A second run does nothing until a lock changes; `make` never touches it, as its own .venv has no Ray.
set -eu
cd "$(dirname "$0")/../.."
locks=deploy/docker/requirements own=.venv-ray
new=$(cat "$locks/build.lock" "$locks/train-common.lock" "$locks/train-cuda.lock" setup.py settings.ini | sha256sum)
[ "$new" != "$(cat "$own/.of" 2> /dev/null)" ] || exit 0
[ -x "$own/bin/python" ] || "${PYTHON:-python3.11}" -m venv "$own"
install() { "$own/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$@"; }
install --require-hashes --only-binary :all: --requirement "$locks/build.lock"
install --require-hashes --no-build-isolation --requirement "$locks/train-common.lock"
install --require-hashes --only-binary :all: --requirement "$locks/train-cuda.lock"
install --no-build-isolation --editable .
echo "$new" > "$own/.of"
