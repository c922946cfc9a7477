#!/usr/bin/env bash
# What a first half hour on one GPU should measure, most wanted first: three calls of ten minutes at most, or single steps by name.
#   bash launch/gpu-hour.sh 1 | 2 | 3        the steps of a call, one after the other
#   bash launch/gpu-hour.sh forward-bf16 …   these steps
#   bash launch/gpu-hour.sh --list [STEP …]  what would run, and for how long at most; nothing runs
# A step that fails or outlasts its time is named at the end, and the others run all the same; the exit code is then 1.
# OUT (docs/results by default) gets gpu-STEP.json of each step, and gpu-hour.log with all that they said. PYTHON names an interpreter with
# JAX's CUDA plugin (python3 by default), WHEELS a folder of wheels to be installed beside it, without a network, for what it lacks.
# CONFIG, SCHEME and SECONDS_EACH can be set for a smaller trial.
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2
# shellcheck source=launch/gpu-flags.sh
source "$root/launch/gpu-flags.sh"

out=${OUT:-$root/docs/results}
python=${PYTHON:-python3}
config=${CONFIG:-configs/streamdit_4b_quality.py}
scheme=${SCHEME:-N8c2s1}
each=${SECONDS_EACH:-10}
bench=("$python" -m streamdit_jax.cli bench "--config=$config" "--scheme=$scheme" --guidance=1 "--seconds=$each" --json)
forward=("${bench[@]}" --what=forward)
train=("$python" -m streamdit_jax.cli bench --what=train "--config=$config" "--seconds=$each" --json
  --config.training.flow_matching.batch_size=1 --config.training.flow_matching.accumulate=1)

# STEP:CALL:SECONDS, in the order of their worth.
steps=(
  kernels:1:120 forward-bf16:1:190 forward-fp8:1:280
  stream-bf16:2:250 stream-fp8:2:340
  train:3:140 compare:3:160 kernels-tune:3:80 flags-triton:3:70 flags-graphs-off:3:70 flags-graphs-conditional:3:70
)

command_of() { # STEP → the array $command and the XLA flags in $flags
  flags=("${gpu_flags_stream[@]}")
  case $1 in
    kernels) command=("$python" -m streamdit_jax.bench.kernels --json) ;;
    kernels-tune) command=("$python" -m streamdit_jax.bench.kernels --json --tune --no-torch --shape streamdit_4b_shifted) ;;
    forward-bf16) command=("${forward[@]}" --precision=bf16) && flags+=("--xla_gpu_dump_autotune_results_to=$out/gpu-autotune.textproto") ;;
    forward-fp8) command=("${forward[@]}" --precision=fp8) ;;
    stream-bf16) command=("${bench[@]}" --precision=bf16 "--sessions=1,2") ;;
    stream-fp8) command=("${bench[@]}" --precision=fp8 "--sessions=1,2") ;;
    train) command=("${train[@]}") && flags=("${gpu_flags_train[@]}") ;;
    compare) command=("${forward[@]}" --precision=bf16 --compare) ;;
    flags-*)
      local name=${1#flags-}
      local -n variant=gpu_flags_${name//-/_}
      command=("${forward[@]}" --precision=bf16) && flags=("${variant[@]}")
      ;;
  esac
}

chosen() { # the steps that the arguments name, as STEP:SECONDS lines, in the list's order
  local step name call seconds wanted
  for step in "${steps[@]}"; do
    IFS=: read -r name call seconds <<<"$step"
    for wanted in "$@"; do
      if [ "$wanted" = "$name" ] || [ "$wanted" = "$call" ] || [[ "$name" = "$wanted"-* ]]; then
        echo "$name:$seconds"
        break
      fi
    done
  done
}

list=
if [ "${1:-}" = --list ]; then
  list=yes
  shift
  [ "$#" -gt 0 ] || set -- 1 2 3
fi
for wanted in "$@"; do
  if [ -z "$(chosen "$wanted")" ]; then
    echo "gpu-hour.sh: $wanted is no step; bash launch/gpu-hour.sh --list names them" >&2
    exit 2
  fi
done
if [ "$#" -eq 0 ]; then
  echo "gpu-hour.sh: name a call (1, 2 or 3) or steps; bash launch/gpu-hour.sh --list names them" >&2
  exit 2
fi

# Beside what XLA holds, the peer of `compare` and new processes come one after the other, never at once.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
if [ -z "$list" ]; then
  mkdir -p "$out"
  if [ -n "${WHEELS:-}" ]; then
    site=$(mktemp -d)
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" "$WHEELS"/*.whl || exit 2
    export PYTHONPATH=$PYTHONPATH:$site
  fi
fi

failed=()
while IFS=: read -r name seconds; do
  command_of "$name"
  echo "== $name, at most $seconds s: XLA_FLAGS='${flags[*]}' ${command[*]}"
  [ -z "$list" ] || continue
  began=$SECONDS
  if XLA_FLAGS=${flags[*]} timeout --kill-after=10 "$seconds" "${command[@]}" </dev/null >"$out/gpu-$name.json.part" 2>>"$out/gpu-hour.log"; then
    mv "$out/gpu-$name.json.part" "$out/gpu-$name.json"
    echo "   done in $((SECONDS - began)) s"
  else
    echo "   failed with $? after $((SECONDS - began)) s:"
    tail -n 3 "$out/gpu-hour.log"
    rm -f "$out/gpu-$name.json.part"
    failed+=("$name")
  fi
done < <(chosen "$@")
if [ "${#failed[@]}" -gt 0 ]; then
  echo "gpu-hour.sh: failed: ${failed[*]}" >&2
  exit 1
fi
