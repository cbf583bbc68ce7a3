#!/bin/sh
# Cut the images' locks out of requirements.lock (make deploy-locks); a version that the lock has is never another here.
set -eu
cd "$(dirname "$0")/../../.."
here=deploy/docker/requirements
# uv remembers what setup.py asked for by the file's time, and does not see that settings.ini changed
touch setup.py
torch="torch torchvision triton cuda-bindings cuda-pathfinder cuda-toolkit nvidia-cublas nvidia-cuda-cccl nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx"
without=""
for name in $torch; do without="$without --no-emit-package $name"; done

cut() { # what comes out, then uv's arguments
    out=$here/$1.lock; shift
    uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 \
        --python-platform x86_64-manylinux_2_28 --constraint requirements.lock --output-file "$out" "$@"
}
all="setup.py $here/train.in --extra train --extra llm --extra clinic --extra ops"
cut build $here/build.in
cut vit $here/vit.in
cut page setup.py $here/vit.in --extra clinic
cut watch $here/vit.in $here/watch.in
cut mlflow $here/mlflow.in
cut llm-cuda $here/llm.in
# shellcheck disable=SC2086  # lists of options
cut llm-cpu $here/llm.in $without
# shellcheck disable=SC2086
cut train-common $all $without
# shellcheck disable=SC2086
cut train-whole $all
# the rest of the whole: torch and what it brings
python3 - "$here" <<'PYTHON'
import re, sys
from pathlib import Path
here = Path(sys.argv[1])
pins = lambda name: re.findall(r"^[\w.\[\]-]+==(?:.*\\\n)*.*\n", (here / name).read_text(), re.M)
common = set(pins("train-common.lock"))
(here / "train-cuda.lock").write_text("".join(p for p in pins("train-whole.lock") if p not in common))
(here / "train-whole.lock").unlink()
PYTHON
