#!/usr/bin/env bash
# Makes the CPU environment in the folder $1, from the lock.
set -euo pipefail
venv=${1:?usage: setup_env.sh FOLDER}
python=${PYTHON:-python3}
torch=2.13.0

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || {
  echo "error: $python is not Python 3.11 or 3.12; say which to use: make PYTHON=python3.12" >&2; exit 2; }
command -v g++ >/dev/null || {
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -q && apt-get install -qy g++
  else echo "error: DeepSpeed builds one small operator and needs g++: install it (e.g. apt-get install g++)" >&2; exit 2; fi; }

"$python" -m venv --clear "$venv" || {
  echo "error: $python cannot make virtual environments: install it (e.g. apt-get install python3-venv)" >&2; exit 2; }
pip="$venv/bin/python -m pip"
$pip install -q --upgrade pip
# The plain release is the CUDA build in most places: ask for the CPU build by name first, in what is
# configured here, then in PyTorch's own index of CPU builds.
$pip install -q --only-binary :all: "torch==$torch+cpu" ||
  $pip install -q --only-binary :all: --index-url https://download.pytorch.org/whl/cpu "torch==$torch+cpu"
$pip install -q --no-deps -r requirements/cpu.lock
$pip install -q --no-deps --no-build-isolation -e .
