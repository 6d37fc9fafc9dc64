#!/usr/bin/env bash
# Runs jfe_jax on Cloud TPU VMs: one slice or several.
#
#   launch/tpu_vm.sh create          ask for the slices and wait until they are there
#   launch/tpu_vm.sh install         copy what is committed here to every worker and install it
#   launch/tpu_vm.sh run ARGS…       `jfe ARGS…` on every worker, in the background
#   launch/tpu_vm.sh logs            follow worker 0
#   launch/tpu_vm.sh stop            SIGTERM to every worker: the run saves and ends
#   launch/tpu_vm.sh delete          give the slices back
#
# `--dry-run` before the verb prints the commands instead. Set: NAME, ZONE, TYPE (v5litepod-256, v5p-128, v6e-256, …);
# and as needed SLICES (1), SPOT=1, PROJECT, RUNTIME (the TPU software; chosen by TYPE).
# Checkpoints have to outlive the machines: give the run an `--output` on a disk that all workers share.
set -euo pipefail

dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
verb=${1:-}
shift || true

fail() {
  echo "tpu_vm.sh: $1" >&2
  exit 2
}

[ -n "${NAME:-}" ] && [ -n "${ZONE:-}" ] || fail "set NAME and ZONE"
slices=${SLICES:-1}
common=("--zone=$ZONE")
[ -z "${PROJECT:-}" ] || common+=("--project=$PROJECT")

do_it() {
  if [ -n "$dry" ]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

nodes() {
  if [ "$slices" = 1 ]; then
    echo "$NAME"
  else
    for ((i = 0; i < slices; i++)); do echo "$NAME-$i"; done
  fi
}

# On every worker of every slice, one slice after the other.
everywhere() {
  local node
  for node in $(nodes); do
    do_it gcloud compute tpus tpu-vm ssh "$node" "${common[@]}" --worker=all --command="$1"
  done
}

runtime() {
  case $TYPE in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "TYPE $TYPE: set RUNTIME too" ;;
  esac
}

case $verb in
  create)
    [ -n "${TYPE:-}" ] || fail "set TYPE, as v5litepod-256"
    version=${RUNTIME:-$(runtime)}
    ask=(gcloud compute tpus queued-resources create "$NAME" "${common[@]}" "--accelerator-type=$TYPE"
      "--runtime-version=$version")
    if [ "$slices" = 1 ]; then
      ask+=("--node-id=$NAME")
    else
      ask+=("--node-count=$slices" "--node-prefix=$NAME")
    fi
    [ -z "${SPOT:-}" ] || ask+=(--spot)
    do_it "${ask[@]}"
    describe=(gcloud compute tpus queued-resources describe "$NAME" "${common[@]}" "--format=value(state.state)")
    if [ -n "$dry" ]; then
      do_it "${describe[@]}"
      exit
    fi
    while state=$("${describe[@]}"); [ "$state" != ACTIVE ]; do
      case $state in
        FAILED | SUSPENDED) fail "$NAME is $state; see gcloud compute tpus queued-resources describe $NAME" ;;
      esac
      echo "$NAME: $state"
      sleep 30
    done
    ;;
  install)
    # Whole commits only: every worker is to run the same code, and one that can be named afterwards.
    archive=$(mktemp -d)/jfe.tar.gz
    trap 'rm -rf "$(dirname "$archive")"' EXIT
    do_it git archive --format=tar.gz --output="$archive" HEAD
    for node in $(nodes); do
      do_it gcloud compute tpus tpu-vm scp "$archive" "$node:jfe.tar.gz" "${common[@]}" --worker=all
    done
    everywhere 'mkdir -p jfe && tar xzf jfe.tar.gz -C jfe && python3 -m venv jfe/.venv && jfe/.venv/bin/pip install -q -e "jfe[tpu]"'
    ;;
  run)
    [ $# -gt 0 ] || fail "run what? as: run train --config configs/paligemma_3b/stage2.yaml"
    line=$(printf '%q ' "$@")
    everywhere "cd jfe && { JFE_DISTRIBUTED=1 nohup .venv/bin/jfe ${line% } > run.log 2>&1 < /dev/null & echo \$! > run.pid; }"
    ;;
  logs)
    first=$(nodes | head -n 1)
    do_it gcloud compute tpus tpu-vm ssh "$first" "${common[@]}" --worker=0 --command='tail -n 100 -f jfe/run.log'
    ;;
  stop)
    everywhere "xargs kill -TERM < jfe/run.pid"
    ;;
  delete)
    do_it gcloud compute tpus queued-resources delete "$NAME" "${common[@]}" --force --quiet
    ;;
  *)
    fail "give one of create, install, run, logs, stop, delete"
    ;;
esac
