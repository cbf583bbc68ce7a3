#!/bin/sh
# Staging on this machine: start the service that reads films, load it, stop it. Exit 4: it would be rolled back.
set -eu
cd "$(dirname "$0")/../.."
films=$(ls models/release/examples/*.png)
log=$(mktemp) state=$(mktemp -d)
# its own interpreter in the foreground of this shell, so that its process is the one that is stopped
CXR_STATE=$state CXR_THREADS=1 .venv/bin/python -m cxr_pred.cli serve --no-ui --port 0 > "$log" 2>&1 &
service=$!
trap 'kill $service 2> /dev/null || true; wait $service 2> /dev/null || true; rm -r "$state" "$log"' EXIT
tries=0
until url=$(sed -n 's#^X-ray reader: \(http://[^/]*\)/.*#\1#p' "$log") && [ -n "$url" ] && .venv/bin/python -c "import sys, urllib.request as u; u.urlopen(sys.argv[1] + '/readyz', timeout=4)" "$url" 2> /dev/null; do
    tries=$((tries + 1))
    [ $tries -lt 120 ] || { echo "The service is not ready after two minutes:" >&2; cat "$log" >&2; exit 1; }
    kill -0 $service || { cat "$log" >&2; exit 1; }
    sleep 1
done
# shellcheck disable=SC2086  # names without spaces
.venv/bin/python deploy/ci/load.py "$url" $films "$@"
