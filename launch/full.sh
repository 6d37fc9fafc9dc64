#!/usr/bin/env bash
# The comparison of docs/results/emoji.md: three seeds of JFE and both late-fusion baselines. Resumable: run it again after a stop.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
exec python launch/emoji.py full "$@"
