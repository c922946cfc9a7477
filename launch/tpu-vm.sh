#!/usr/bin/env bash
# Trains on Cloud TPU VMs without Kubernetes, by queued resources, from the image of launch/docker/Dockerfile.tpu:
#   TPU_NAME=run ZONE=us-east5-b TPU_TYPE=v6e-256 RUNTIME=v2-alpha-tpuv6e IMAGE=… NFS=10.0.0.2:/work \
#     launch/tpu-vm.sh [--dry-run] create|wait|install|run|logs|stop|delete [ARGUMENTS of streamdit train]
# create asks for the machines (SPOT=1: preemptible ones), wait returns when they are there, install mounts NFS as /mnt/work and fetches the
# image on all of them, run starts training on all, logs follows the first, stop sends SIGTERM to all, delete gives the machines back.
# --dry-run prints the gcloud commands instead. PROJECT and SLICES (more than one: several slices) are optional.
set -euo pipefail
dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
what=${1:-}
[ $# -eq 0 ] || shift
poll=${POLL_SECONDS:-30}
slices=${SLICES:-1}

need() {
  local name
  for name in "$@"; do
    if [ -z "${!name:-}" ]; then
      echo "tpu-vm.sh: $name: missing; give it as NAME=VALUE before the command" >&2
      exit 2
    fi
  done
}

tpus() {
  local command=(gcloud compute tpus "$@" "--zone=$ZONE")
  [ -z "${PROJECT:-}" ] || command+=("--project=$PROJECT")
  if [ -n "$dry" ]; then
    printf '%q ' "${command[@]}"
    echo
  else
    "${command[@]}"
  fi
}

nodes() { # the names of the slices: the name itself, or with several, name-0, name-1, …
  local slice
  if [ "$slices" -eq 1 ]; then
    echo "$TPU_NAME"
  else
    for ((slice = 0; slice < slices; slice++)); do
      echo "$TPU_NAME-$slice"
    done
  fi
}

everywhere() { # a command on every machine of every slice, at the same time
  local node pids=() pid failed=0
  for node in $(nodes); do
    tpus tpu-vm ssh "$node" --worker=all --command="$1" </dev/null &
    pids+=($!)
    [ -z "$dry" ] || wait "$!"
  done
  for pid in "${pids[@]}"; do
    wait "$pid" || failed=$?
  done
  return "$failed"
}

need TPU_NAME ZONE
case $what in
create)
  need TPU_TYPE RUNTIME
  options=("--accelerator-type=$TPU_TYPE" "--runtime-version=$RUNTIME")
  if [ "$slices" -eq 1 ]; then
    options+=("--node-id=$TPU_NAME")
  else
    options+=("--node-count=$slices" "--node-prefix=$TPU_NAME")
  fi
  [ -z "${SPOT:-}" ] || options+=(--spot)
  tpus queued-resources create "$TPU_NAME" "${options[@]}"
  ;;
wait)
  while :; do
    state=$(tpus queued-resources describe "$TPU_NAME" "--format=value(state.state)")
    echo "$state"
    case $state in
    ACTIVE) break ;;
    FAILED | SUSPENDING | SUSPENDED) exit 1 ;;
    esac
    [ -z "$dry" ] || break
    sleep "$poll"
  done
  ;;
install)
  need IMAGE NFS
  mount="sudo mkdir -p /mnt/work && (mountpoint -q /mnt/work || sudo mount -t nfs $(printf %q "$NFS") /mnt/work)"
  registry=${IMAGE%%/*}
  everywhere "$mount && sudo gcloud auth configure-docker --quiet $(printf %q "$registry") && sudo docker pull $(printf %q "$IMAGE")"
  ;;
run)
  need IMAGE
  arguments=$(printf '%q ' "$@")
  everywhere "sudo docker rm -f streamdit >/dev/null 2>&1; sudo docker run --detach --name=streamdit --privileged --net=host --shm-size=16g \
--stop-timeout=600 --env=STREAMDIT_CLUSTER=tpu-vm --volume=/mnt/work:/work $(printf %q "$IMAGE") $arguments"
  ;;
logs)
  tpus tpu-vm ssh "$(nodes | head -n 1)" --worker=0 --command="sudo docker logs --follow --tail=100 streamdit"
  ;;
stop)
  everywhere "sudo docker stop --time=600 streamdit"
  ;;
delete)
  tpus queued-resources delete "$TPU_NAME" --force --quiet
  ;;
*)
  echo "tpu-vm.sh: ${what:-nothing} is none of create, wait, install, run, logs, stop, delete" >&2
  exit 2
  ;;
esac
