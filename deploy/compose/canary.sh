#!/bin/sh
# How many films in a hundred the canary reads: ./canary.sh 10, ./canary.sh 0 to take it out, ./canary.sh to ask.
set -eu
share=${1:-}
say() { docker compose --file "$(dirname "$0")/compose.yaml" exec -T haproxy sh -c "printf '%s\n' \"\$1\" | nc \"\${ADMIN%:*}\" \"\${ADMIN##*:}\"" sh "$1"; }
case $share in
    '') say 'show servers state vit' ;;
    *[!0-9]*) echo "A share is a whole number from 0 to 100, not $share." >&2; exit 2 ;;
    *)
        [ "$share" -le 100 ] || { echo "A share is at most 100." >&2; exit 2; }
        # what gets films first: between the two words both could have none
        canary="set server vit/canary weight $share" stable="set server vit/stable weight $((100 - share))"
        if [ "$share" -eq 0 ]; then say "$stable"; say "$canary"; else say "$canary"; say "$stable"; fi ;;
esac
