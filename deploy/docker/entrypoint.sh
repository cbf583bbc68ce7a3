#!/bin/sh
# Secrets come as files, the programs read the environment: /run/secrets/cxr_database_url becomes CXR_DATABASE_URL.
set -eu
for file in "${SECRETS_DIR:-/run/secrets}"/*; do
    [ -s "$file" ] && [ -f "$file" ] || continue # an empty one sets nothing
    name=$(basename "$file" | tr '[:lower:]' '[:upper:]')
    case $name in
        *[!A-Z_]*) continue ;; # no name of a variable
    esac
    value=$(cat "$file")
    export "$name=$value"
done
exec "$@"
