#!/bin/sh
# The commit's own checks: library and notebooks say the same, notebooks carry nothing of the machine that ran them, and no name is undefined.
set -eu
cd "$(dirname "$0")/../.."
before=$(git status --porcelain)
.venv/bin/nbdev_export
.venv/bin/nbdev_clean
after=$(git status --porcelain)
[ "$before" = "$after" ] || { echo "These are not clean, or not exported (nbdev_export, nbdev_clean):" >&2; echo "$after" >&2; exit 1; }
.venv-deploy/bin/ruff check --no-cache --config deploy/checks/ruff.toml setup.py cxr_pred nbs tests deploy
echo "The library is what the notebooks say."
