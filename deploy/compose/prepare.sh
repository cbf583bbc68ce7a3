#!/bin/sh
# Make the secrets that are not there yet, one value a file; what is there is kept.
# ./prepare.sh reader.hospital.example: names that the certificate should hold beside this machine's own.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p secrets
cd secrets

random() { [ -s "$1" ] || openssl rand -hex 24 | tr -d '\n' > "$1"; }
for name in postgres_password cxr_database_password mlflow_database_password airflow_database_password cxr_physician_key cxr_session_key films_secret_access_key \
    aws_secret_access_key grafana_password elastic_password kibana_password filebeat_password ray_auth_token jupyter_token airflow_jwt_secret; do random "$name"; done
[ -s aws_access_key_id ] || printf 'cxr' > aws_access_key_id
[ -s films_access_key_id ] || printf 'cxr-films' > films_access_key_id # the readers' own, with compose.bucket.yaml
[ -s airflow_fernet_key ] || openssl rand -base64 32 | tr '+/' '-_' | tr -d '\n' > airflow_fernet_key
[ -e smtp_password ] || : > smtp_password # the mail server's; empty where it wants none
[ -e cxr_oidc_client_secret ] || : > cxr_oidc_client_secret # what the hospital's log-in gave; empty without one

url() { [ -s "$1" ] || printf '%s://%s:%s@postgres/%s' "$2" "$3" "$(cat "$4")" "$5" > "$1"; }
url cxr_database_url postgresql+pg8000 cxr cxr_database_password cxr
url mlflow_backend_store_uri postgresql+pg8000 mlflow mlflow_database_password mlflowdb
url airflow_database_url postgresql+psycopg2 airflow airflow_database_password airflow

[ -s orthanc_users ] || printf '{"RegisteredUsers": {"cxr": "%s"}}' "$(openssl rand -hex 24)" > orthanc_users
[ -s airflow_passwords ] || printf '{"admin": "%s"}' "$(openssl rand -hex 24)" > airflow_passwords
# self-signed, until the hospital's own is put in its place (certificate and key in one file)
names="DNS:localhost,IP:127.0.0.1"
for name in "$(hostname)" "$@"; do
    case $name in '' | *[!A-Za-z0-9.-]*) echo "A certificate can't hold the name '$name'." >&2; exit 2 ;; esac
    names="$names,DNS:$name"
done
[ -s certificate ] || { openssl req -x509 -newkey rsa:3072 -nodes -days 365 -subj "/CN=cxr_pred" -addext "subjectAltName=$names" -keyout key.part -out cert.part 2> /dev/null
    cat cert.part key.part > certificate && rm cert.part key.part; }
# the containers' own users read them, nobody else on this machine reaches the folder
chmod 0444 ./*
chmod 0700 .
