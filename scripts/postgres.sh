#!/usr/bin/env bash
# Installs the PostgreSQL server that the tests of the examples start, in CI alone,
# as root and where apt-get is; without it they ask for it.
set -euo pipefail
if [ "${CI:-}" != true ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then exit 0; fi
if command -v initdb >/dev/null || ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1; then exit 0; fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -q
# Nothing is to run of it but what the tests start.
mkdir -p /etc/postgresql-common/createcluster.d
echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.d/none.conf
apt-get install -y -q --no-install-recommends postgresql
