#!/usr/bin/env bash
# Installs what some tests are skipped without: a browser, PostgreSQL, Prometheus, Slurm, libaio. Debian only.
set -euo pipefail
wanted=(chromium postgresql prometheus slurm-wlm munge libaio-dev)
missing=()
for package in "${wanted[@]}"; do
  dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "error: install these, or go without the tests that need them: ${missing[*]}" >&2; exit 2
fi
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -qy "${missing[@]}"
