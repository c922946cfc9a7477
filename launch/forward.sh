# Sourced by the launch scripts: `forwarding COMMAND…` runs a command, sends it each SIGTERM and SIGINT that comes for this shell, and waits
# for its end. Sets $code, its exit code, and $signals, how many came.

# shellcheck disable=SC2034  # $code is for whoever sources this
signals=0
child=
forwarding() {
  local result seen=-1
  trap 'signals=$((signals + 1)); [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true' TERM
  trap 'signals=$((signals + 1)); [ -z "$child" ] || kill -INT "$child" 2>/dev/null || true' INT
  "$@" &
  child=$!
  code=127
  while [ "$seen" -ne "$signals" ]; do # a signal ends `wait` early, with a code that is not the command's
    seen=$signals
    result=0
    wait "$child" || result=$?
    [ "$result" -eq 127 ] || code=$result # 127: its code was known before
  done
  child=
}
