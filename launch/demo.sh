#!/usr/bin/env bash
# From a bare machine with Python 3.11+ to a trained, evaluated and converted JFE, beside a late-fusion baseline.
# Run again, it does only what is not done yet; `rm -r runs/emoji-demo` starts the training afresh.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
exec python launch/emoji.py demo "$@"
