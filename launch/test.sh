#!/usr/bin/env bash
# Sets up an environment and runs every test that this machine can run, a file on each core. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh test
ruff check .
ruff format --check .
exec python -m pytest -n auto --dist loadfile "$@"
