#!/bin/sh
# Makes the passwords that compose.yaml names, once; those that are there stay.
set -eu
cd "$(dirname "$0")"
umask 077
mkdir -p secrets
random() { head -c 24 /dev/urandom | base64 | tr '+/' '-_'; }
for name in postgres_password grafana_password everloop_engine_key; do
    [ -e "secrets/$name" ] || random | tr -d '\n' >"secrets/$name"
done
[ -e secrets/everloop_prefect_auth ] || printf 'everloop:%s' "$(random)" >secrets/everloop_prefect_auth
[ -e secrets/everloop_database_url ] || printf 'postgresql+psycopg://everloop:%s@postgres:5432/everloop' \
    "$(cat secrets/postgres_password)" >secrets/everloop_database_url
# The directory keeps others out; in their containers the files are read by users of other numbers.
chmod 444 secrets/*
echo "secrets are in $(pwd)/secrets"
