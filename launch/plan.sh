#!/usr/bin/env bash
# Makes the environment of `streamdit plan` and compiles every target of docs/scale.md, and the kernels; fails where one is missed. For a nightly run, on a
# machine that does nothing else. Arguments go to pytest, as -k v5p; STREAMDIT_PLANS=docs/results writes the reports there.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
environment "${STREAMDIT_PLAN_VENV:-$root/.venv-plan}" "${root}[plan]"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "pytest>=8"
# Without a compilation cache: compilers are asked what they say, and how long they take.
export PYTHONPATH=$root JAX_PLATFORMS=cpu JAX_ENABLE_COMPILATION_CACHE=false
exec "$venv/bin/python" -m pytest -v -m nightly tests/plan "$@"
