#!/bin/sh
# The program's commands, in the page's container (rollout: in its own): ./cxr-pred.sh users add anna --role physician.
# By the image's entrypoint, which hands on the secrets: without them a command would make a database of its own.
set -eu
tty=; [ -t 0 ] || tty=-T
service=page; [ "${1:-}" != rollout ] || service=rollout   # compose.rollout.yaml has it, beside HAProxy's switch
cd "$(dirname "$0")"
exec docker compose exec ${tty:+"$tty"} "$service" /opt/entrypoint.sh cxr-pred "$@"
