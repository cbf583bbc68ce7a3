#!/bin/sh
# A backup back: ./restore.sh 2026-11-27. What is there now is put aside and not deleted: the database cxr_before_TIME, and in the
# volume of the films the folder before_TIME. Nothing is read meanwhile.
set -eu
cd "$(dirname "$0")"
name=${1:-}
case $name in '' | .* | -* | *[!A-Za-z0-9._-]*) echo "Name a backup: docker compose exec page ls /backups" >&2; exit 2 ;; esac
aside=before_$(date -u +%Y%m%d_%H%M%S)
inside() { docker compose run --rm --no-deps -T page "$@" < /dev/null; }

inside test -f "/backups/$name/manifest.json" || { echo "There is no backup $name: docker compose exec page ls /backups" >&2; exit 1; }
printf 'Readers stop, and what they hold is replaced by the backup %s. Type its name to go on: ' "$name"
read -r answer
[ "$answer" = "$name" ] || { echo "Nothing was changed." >&2; exit 1; }

docker compose --profile '*' stop haproxy vit vit-canary page cxr-watch ray-worker
# with compose.rollout.yaml: its next decision would be a row in the new database
if docker compose config --services | grep -qx rollout; then docker compose stop rollout; fi
docker compose exec -T postgres psql --username postgres --quiet --output /dev/null --set ON_ERROR_STOP=1 --set "aside=cxr_$aside" << 'SQL'
SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = 'cxr';
ALTER DATABASE cxr RENAME TO :"aside";
CREATE DATABASE cxr OWNER cxr;
REVOKE CONNECT ON DATABASE cxr FROM PUBLIC;
SQL
# shellcheck disable=SC2016 # $1 is that shell's
inside sh -ec 'cd /var/lib/cxr; mkdir -m 700 "$1"; for f in films patient.key; do if [ -e "$f" ]; then mv "$f" "$1"; fi; done' sh "$aside"
inside cxr-pred restore "/backups/$name" || { echo "It was not restored. What was there is in the database cxr_$aside and in the folder $aside of the volume films." >&2; exit 1; }
docker compose up --detach --wait
echo "Restored. When you have looked at it, delete what was put aside: docker compose exec postgres dropdb --username postgres cxr_$aside; docker compose exec page rm -r /var/lib/cxr/$aside. With the films in a bucket, those without a row stay there until you say that it is this database's alone: ./cxr-pred.sh sweep --own"
