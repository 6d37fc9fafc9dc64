# shellcheck shell=bash
# Sourced by demo.sh and test.sh: an environment of our own in .venv, made once, remade when setup.cfg changes.
# Usage: . launch/setup.sh [extra]
extra=${1:-}
python=${PYTHON:-python3}
"$python" - <<'PY' || { echo "jfe_jax needs Python 3.11 or newer: set PYTHON to one" >&2; exit 1; }
import sys
sys.exit(sys.version_info < (3, 11))
PY
venv=${JFE_VENV:-$PWD/.venv}
stamp=$venv/.jfe-$extra-$(cksum < setup.cfg | tr ' ' -)
if [ ! -e "$stamp" ]; then
  echo "installing into $venv (once, a few minutes)"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  if [ "$extra" = test ]; then
    # The CPU build of the oracle; an open range would fetch several GB of CUDA libraries.
    "$venv/bin/python" -m pip install -q 'torch==2.13.0'
  fi
  "$venv/bin/python" -m pip install -q -e ".${extra:+[$extra]}"
  touch "$stamp"
fi
PATH=$venv/bin:$PATH
