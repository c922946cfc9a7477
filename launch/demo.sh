#!/usr/bin/env bash
# Streams a prompt to stream.mp4 on any machine with Python 3.11 or newer. The first run makes an environment beside this checkout.
#   bash launch/demo.sh "a red car drives past green hills on a sunny day" [--at 2:"a red car drives through snow at night"] [--seconds 8] …
# Further arguments go to `streamdit stream`. PYTHON names the interpreter; STREAMDIT_VENV the environment.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
environment "${STREAMDIT_VENV:-$root/.venv}" "$root"
exec "$venv/bin/streamdit" stream "$@"
