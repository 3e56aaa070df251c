#!/usr/bin/env bash
# Trains or evaluates on all workers of a Cloud TPU: makes the TPU or takes the one there
# is, copies the files of the last commit, installs, sets up, runs, shows worker 0, and
# begins again after a preemption until the program ends by itself.
#
#   bash launch/tpu_pod.sh --name=NAME --zone=us-west4-a --type=v5litepod-16 \
#       [--version=RUNTIME] [--project=PROJECT] [--spot] [--setup=COMMAND] [--dry_run] \
#       -- launch.train --config=configs/cityscapes.py --workdir=/mnt/shared/runs/city
#   bash launch/tpu_pod.sh --name=NAME --zone=ZONE --delete [--dry_run]
#
# Needs gcloud, logged in. Workers share the directory of the run, on a file system such as
# Filestore (of a bucket, renames are not atomic): --setup is run on each of them before
# every start, so it must bear being run again:
#   --setup='mountpoint -q /mnt/shared || { sudo mkdir -p /mnt/shared &&
#            sudo mount 10.0.0.2:/share /mnt/shared; }'
# --dry_run prints every command and runs none. A TPU costs money until it is deleted:
# --delete ends that, and nothing else here does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/shell.sh

answer_help "$@"
name='' zone='' type='' version='' setup='' project=() spot=() delete='' dry_run=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --project=*) project=("--project=${1#*=}") ;;
    --spot) spot=(--spot) ;;
    --setup=*) setup=${1#*=} ;;
    --delete) delete=yes ;;
    --dry_run) dry_run=yes ;;
    *) fail "unknown argument $1; bash launch/tpu_pod.sh alone lists them" ;;
  esac
  shift
done
if [ -z "$name" ] || [ -z "$zone" ]; then
  usage
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
  usage
fi
shift
check_program "$1"
if [ -z "$version" ]; then
  case $type in
    v6e*) version=v2-alpha-tpuv6e ;;
    v5p*) version=v2-alpha-tpuv5 ;;
    v5lite*) version=v2-alpha-tpuv5-lite ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# ACTIVE, SUSPENDED, ...; ABSENT where there is no such resource, SILENT where gcloud does
# not say.
state() {
  if ! "${tpus[@]}" queued-resources describe "$name" "${where[@]}" \
    --format='value(state.state)' 2>"$folder/said"; then
    if grep -q NOT_FOUND "$folder/said"; then echo ABSENT; else echo SILENT; fi
  fi
}

# Seconds between two looks at the TPU, and looks before an answer is taken as it is.
pause=${MPMC_POD_PAUSE:-30} patience=10

# Leaves with the TPU there, made anew if it was taken away.
acquire() {
  local found=ABSENT made='' silent=0
  while true; do
    if [ -z "$dry_run" ]; then
      found=$(state)
    fi
    case $found in
      ACTIVE) return ;;
      SUSPENDED | SUSPENDING | FAILED)
        if [ "$found$made" = FAILEDyes ]; then
          fail "the TPU $name was refused; gcloud compute tpus queued-resources describe $name says why"
        fi
        run "${tpus[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
        made=
        continue
        ;;
      ABSENT | SILENT)
        if [ "$found$made" = ABSENT ]; then
          run "${tpus[@]}" queued-resources create "$name" --node-id="$name" "${where[@]}" \
            --accelerator-type="$type" --runtime-version="$version" ${spot[@]+"${spot[@]}"}
          made=yes
        fi
        silent=$((silent + 1))
        if [ "$silent" -gt "$patience" ]; then
          fail "nothing is heard of $name: $(cat "$folder/said")"
        fi
        ;;
      *) silent=0 ;;
    esac
    if [ -n "$dry_run" ]; then
      return
    fi
    echo "waiting for $name: $found"
    if [ "$found" = SILENT ]; then cat "$folder/said"; fi
    sleep "$pause"
  done
}

# Whether the TPU goes away: it is said to be there for a while after it was taken.
taken_away() {
  local look
  for ((look = 0; look < patience; look++)); do
    case $(state) in
      ACTIVE | SILENT) ;;
      *) return 0 ;;
    esac
    sleep "$pause"
  done
  return 1
}

on_all() {
  run "${tpus[@]}" tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"
}

archive=$folder/mpmc_jax.tar.gz
if [ -n "$(git status --porcelain)" ]; then
  echo "warning: what is not committed is not copied:" >&2
  git status --short >&2
fi
run git archive --format=tar.gz --output="$archive" HEAD

install_all() {
  run "${tpus[@]}" tpu-vm scp "$archive" "$name:mpmc_jax.tar.gz" "${where[@]}" --worker=all &&
    on_all 'mkdir -p mpmc_jax && tar -xzf mpmc_jax.tar.gz -C mpmc_jax && cd mpmc_jax &&
python3 -m venv .venv && .venv/bin/python -m pip install --quiet -r requirements.txt "jax[tpu]>=0.10.2,<0.13"' &&
    if [ -n "$setup" ]; then on_all "$setup"; fi
}

program=$(printf ' %q' "MPMC_REVISION=$(git rev-parse HEAD)" .venv/bin/python -m "$@" --distributed)
# Every worker keeps what it says; worker 0 shows it too.
command="set -o pipefail; cd mpmc_jax
number=\$(curl -sf -H 'Metadata-Flavor: Google' http://metadata.google.internal/computeMetadata/v1/instance/attributes/agent-worker-number)
if [ \"\$number\" = 0 ]; then$program 2>&1 | tee -a run.log; else$program >>run.log 2>&1; fi"

while true; do
  acquire
  status=0
  if install_all; then
    on_all "$command" || status=$?
    if [ "$status" -eq 0 ]; then
      exit 0
    fi
    ended="the program ended with status $status; see run.log on the workers"
  else
    ended="the files could not be copied and installed, or --setup failed"
  fi
  # After 75 (stopped by a signal, with all saved) the same TPU will do as well.
  if ! taken_away && [ "$status" -ne 75 ]; then
    fail "$ended"
  fi
  echo "the TPU was taken away or the program told to stop; going on"
done
