#!/bin/bash
# A database and its owner for each service: MLflow, Airflow and the product all keep a table alembic_version.
set -euo pipefail
make_database() { # owner, database, file of the password
    psql --quiet --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --set owner="$1" --set base="$2" --set word="$(cat "/run/secrets/$3")" <<'SQL'
CREATE ROLE :"owner" LOGIN PASSWORD :'word';
CREATE DATABASE :"base" OWNER :"owner";
REVOKE CONNECT ON DATABASE :"base" FROM PUBLIC;
SQL
}
make_database cxr cxr cxr_database_password
make_database mlflow mlflowdb mlflow_database_password
make_database airflow airflow airflow_database_password
