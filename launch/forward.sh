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
  local before=$signals
  trap 'pass_on TERM' TERM
  trap 'pass_on INT' INT
  "$@" &
  child=$!
  if [ "$signals" -ne "$before" ]; then # it came before there was a child to send it to
    kill "-$last" "$child" 2>/dev/null || true
  fi
  while kill -0 "$child" 2>/dev/null; do # not in `wait`: where a signal comes as the command ends, bash 5.2 loses its code there
    sleep 0.5 || true
  done
  trap '' TERM INT # the command has ended, and nothing may interrupt the reading of its code
  code=0
  wait "$child" || code=$?
  child=
  trap 'pass_on TERM' TERM
  trap 'pass_on INT' INT
}
