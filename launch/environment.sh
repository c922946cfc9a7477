# Sourced by the launch scripts: `environment DIR PACKAGE` makes a virtual environment in DIR with PACKAGE installed in editable form, once
# for each state of setup.py, and sets $venv.
environment() {
  venv=$1
  local package=$2 python=${PYTHON:-} stamp candidate
  if [ -z "$python" ]; then
    for candidate in python3 python3.13 python3.12 python3.11; do
      if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
      fi
    done
  fi
  if [ -z "$python" ]; then
    echo "streamdit: Python 3.11 or newer is needed; set PYTHON to it" >&2
    exit 2
  fi
  stamp="$package $(cksum "${BASH_SOURCE[0]%/*}/../setup.py" | cut -d' ' -f1)"
  if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$stamp" ]; then
    echo "streamdit: installing into $venv" >&2
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$package"
    printf '%s' "$stamp" >"$venv/.installed"
  fi
}
