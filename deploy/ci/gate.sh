#!/bin/sh
# The gate of the model that a commit ships, held against the one that was shipped before: gate.sh [COMMIT BEFORE]. Exit 3: halt.
set -eu
cd "$(dirname "$0")/../.."
before=${1:-HEAD} own=runs/clinical/metrics
git cat-file -e "$before:$own/gates.json" 2> /dev/null || { echo "$before is not here, or ships no metrics: fairness is held against this commit's own." >&2; before=HEAD; }
cmp -s "models/release/metrics/gates.json" "$own/gates.json" || { echo "models/release was not made by the run that $own is of: their gates.json differ." >&2; exit 3; }
shipped=$(mktemp -d)
trap 'rm -r "$shipped"' EXIT
git show "$before:$own/gates.json" > "$shipped/gates.json"
python3 deploy/ci/gate.py "$own" "$shipped"
