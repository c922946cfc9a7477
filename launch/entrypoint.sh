#!/usr/bin/env bash
# Runs `streamdit train` with these arguments, in a container, a Slurm task or on a TPU VM, and starts it again where that helps:
#   launch/entrypoint.sh --config=configs/streamdit_4b.py --workdir=/work/4b
# Codes that say "again": 143 and 75 (another process of the run was preempted, died or hung), 134 and 137 (JAX or the kernel ended this one).
# The run then goes on from its newest checkpoint. Where this script itself got SIGTERM, its machine is going: the code is passed on.
#   STREAMDIT_RESTARTS       how often to start again, 10; 0 where a scheduler does it (docs/launching.md)
#   STREAMDIT_RESTART_PAUSE  seconds before that, 10, so that all processes of the run have ended
#   STREAMDIT_FINAL          a file that gets any other code than these and 0: for a scheduler that sees one code for many processes
#   STREAMDIT_COMMAND        what is run, streamdit
set -euo pipefail
# shellcheck source=launch/forward.sh
source "$(dirname "${BASH_SOURCE[0]}")/forward.sh"
read -ra command <<<"${STREAMDIT_COMMAND:-streamdit}"
restarts=${STREAMDIT_RESTARTS:-10}

for ((tries = 0; ; tries++)); do
  forwarding "${command[@]}" train "$@"
  case $code in
  75 | 134 | 137 | 143) ;;
  *)
    if [ "$code" -ne 0 ] && [ -n "${STREAMDIT_FINAL:-}" ]; then
      echo "$code" >"$STREAMDIT_FINAL"
    fi
    exit "$code"
    ;;
  esac
  if [ "$signals" -gt 0 ] || [ "$tries" -ge "$restarts" ]; then
    exit "$code"
  fi
  echo "entrypoint: ended with code $code; starting again ($((tries + 1)) of $restarts)" >&2
  for ((waited = 0; waited < ${STREAMDIT_RESTART_PAUSE:-10} && signals == 0; waited++)); do
    sleep 1
  done
  if [ "$signals" -gt 0 ]; then
    exit "$code"
  fi
done
