#!/bin/sh
# The program's commands, in the page's container: ./cxr-pred.sh users add anna --role physician.
# By the image's entrypoint, which hands on the secrets: without them a command would make a database of its own.
set -eu
tty=; [ -t 0 ] || tty=-T
exec docker compose --file "$(dirname "$0")/compose.yaml" exec ${tty:+"$tty"} page /opt/entrypoint.sh cxr-pred "$@"
