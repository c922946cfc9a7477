# Sourced by the launch scripts: `forwarding COMMAND…` runs a command, sends it each SIGTERM and SIGINT that comes for this shell, and waits
# for its end. Sets $code, its exit code, and $signals, how many came.

# shellcheck disable=SC2034  # $code is for whoever sources this
signals=0
child=
pass_on() {
  signals=$((signals + 1))
  last=$1
  [ -z "$child" ] || kill "-$last" "$child" 2>/dev/null || true
}
forwarding() {
  local result seen=-1 before=$signals
  trap 'pass_on TERM' TERM
  trap 'pass_on INT' INT
  "$@" &
  child=$!
  if [ "$signals" -ne "$before" ]; then # it came before there was a child to send it to
    kill "-$last" "$child" 2>/dev/null || true
  fi
  code=127
  while [ "$seen" -ne "$signals" ]; do # a signal ends `wait` early, with a code that is not the command's
    seen=$signals
    result=0
    wait "$child" || result=$?
    [ "$result" -eq 127 ] || code=$result # 127: its code was known before
  done
  child=
}
