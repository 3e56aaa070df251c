#!/usr/bin/env bash
# Runs a program on all workers of a Cloud TPU: makes the TPU or takes the one there is,
# copies this folder's files, installs, runs, shows worker 0, and begins again after a
# preemption until the program ends by itself.
#
#   bash launch/tpu_pod.sh --name=NAME --zone=us-west4-a --type=v5litepod-16 \
#       [--version=RUNTIME] [--project=PROJECT] [--spot] [--dry_run] \
#       -- launch.train --config=configs/cityscapes.py --workdir=/mnt/shared/runs/city
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --delete [--dry_run]
#
# Needs gcloud, logged in; workers share the directory of the run (Filestore, or a bucket
# mounted by gcsfuse). --dry_run prints every command and runs none. A TPU costs money
# until it is deleted: --delete ends that, and nothing else here does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/shell.sh

name='' zone='' type='' version='' project=() spot=() delete='' dry_run=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=("--project=${1#*=}") ;;
    --spot) spot=(--spot) ;;
    --delete) delete=yes ;;
    --dry_run) dry_run=yes ;;
    *) fail "unknown argument $1; bash launch/tpu_pod.sh alone lists them" ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ]; then
  usage launch/tpu_pod.sh
fi
if [ -z "$dry_run" ] && ! command -v gcloud >/dev/null; then
  fail "gcloud is not on this machine; install the Google Cloud CLI, or say --dry_run"
fi
where=("--zone=$zone" ${project[@]+"${project[@]}"})
tpus=(gcloud compute tpus)

if [ -n "$delete" ]; then
  run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
  exit
fi
if [ -z "$type" ] || [ $# -lt 2 ]; then
  usage launch/tpu_pod.sh
fi
shift
if [ -z "$version" ]; then
  case $type in
    v6e*) version=v2-alpha-tpuv6e ;;
    v5p*) version=v2-alpha-tpuv5 ;;
    v5lite*) version=v2-alpha-tpuv5-lite ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

# ACTIVE, SUSPENDED, ..., or nothing where there is no such resource.
state() {
  "${tpus[@]}" queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>/dev/null || true
}

# Leaves with the TPU there, made anew if it was taken away.
acquire() {
  local found=
  if [ -z "$dry_run" ]; then
    found=$(state)
  fi
  case $found in
    SUSPENDED | SUSPENDING | FAILED)
      run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
      found=
      ;;
  esac
  if [ -z "$found" ]; then
    run "${tpus[@]}" queued-resources create "$name" --node-id="$name" "${where[@]}" \
      --accelerator-type="$type" --runtime-version="$version" ${spot[@]+"${spot[@]}"}
  fi
  until [ -n "$dry_run" ] || [ "$(state)" = ACTIVE ]; do
    case $(state) in
      FAILED) fail "the TPU $name was refused; gcloud compute tpus queued-resources describe $name says why" ;;
    esac
    echo "waiting for $name: $(state)"
    sleep 30
  done
}

on_all() {
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

install_all() {
  local archive
  archive=$(mktemp -d)/mpmc_jax.tar.gz
  run git archive --format=tar.gz --output="$archive" HEAD
  run "${tpus[@]}" tpu-vm scp "$archive" "$name:mpmc_jax.tar.gz" "${where[@]}" --worker=all
  on_all 'mkdir -p mpmc_jax && tar -xzf mpmc_jax.tar.gz -C mpmc_jax && cd mpmc_jax &&
python3 -m venv .venv && .venv/bin/python -m pip install --quiet -r requirements.txt "jax[tpu]>=0.10.2,<0.11"'
}

program=$(printf ' %q' .venv/bin/python -m "$@" --distributed)
# Every worker keeps what it says; worker 0 shows it too.
command="set -o pipefail; cd mpmc_jax
number=\$(curl -sf -H 'Metadata-Flavor: Google' http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
if [ \"\$number\" = 0 ]; then$program 2>&1 | tee -a run.log; else$program >>run.log 2>&1; fi"

while true; do
  acquire
  install_all
  status=0
  on_all "$command" || status=$?
  if [ "$status" -eq 0 ]; then
    exit 0
  fi
  # 75: stopped by a signal, with everything saved. Else the TPU must have gone.
  if [ "$status" -ne 75 ] && [ "$(state)" = ACTIVE ]; then
    fail "the program ended with status $status; see run.log on the workers"
  fi
  echo "the TPU was taken away or the program told to stop; going on"
done
