"""How long a new process takes to its first frame: with nothing compiled yet (cold), and with all of it on disk (warm).

    python -m streamdit_jax.bench.start < SUBJECT.json

is that process: it prints one JSON object as soon as the frames are on the host.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from streamdit_jax.errors import ConfigError, StreamDiTError

PROMPT, SEED = "a red car", 0
LIMIT_SECONDS = 3600.0


def first_frames(subject: str) -> dict[str, Any]:
    """Two new processes, one after the other, with caches of their own that are empty at first, as the command line
    has them: JAX's of executables, and programs that need be neither traced nor lowered.

    subject: `Subject.to_json()`. The first_frame_seconds count from the start of the process, so with Python's and
    jax's own start, to the first frames on the host; `…_parts` say what they were spent on: weights, tracing and
    lowering, compiling or reading what was compiled, and the rest, which is running. compile_seconds: tracing,
    lowering and compiling in the cold one. programs_found: how many the warm one found ready. Call it before this
    process touches the device: an accelerator's memory may serve one process only. Raises ConfigError with the child's
    line where the subject cannot run.
    """
    with tempfile.TemporaryDirectory(prefix="streamdit-bench-") as directory:
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": directory}
        cold, warm = (_run(subject, environment) for _ in range(2))
    return {
        "first_frame_seconds_cold": cold["seconds"],
        "first_frame_seconds_warm": warm["seconds"],
        "first_frame_parts_cold": cold["parts"],
        "first_frame_parts_warm": warm["parts"],
        "compile_seconds": cold["compile_seconds"],
        "programs_found": warm["programs_found"],
    }


def _run(subject: str, environment: dict[str, str]) -> dict[str, Any]:
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "streamdit_jax.bench.start"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
    )
    try:
        said, error = process.communicate(subject, timeout=LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        raise StreamDiTError(f"bench: no first frame within {LIMIT_SECONDS:.0f} seconds") from None
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    try:
        report = json.loads(said.splitlines()[-1])
    except (IndexError, ValueError):
        last = (error.strip().splitlines() or ["no message"])[-1]
        raise StreamDiTError(
            f"bench: the process that was to show a first frame ended with {process.returncode}: {last}"
        ) from None
    if "mistake" in report:
        raise ConfigError(report["mistake"])
    # The clock of the child stops before its interpreter is taken down, which no one waits for.
    report["seconds"] = round(report["at"] - began, 3)
    report["parts"]["python_and_jax"] = round(report["seconds"] - sum(report["parts"].values()), 3)
    return report


def main() -> None:
    """The new process."""
    from streamdit_jax.bench.compilations import Compilations
    from streamdit_jax.bench.subject import from_json
    from streamdit_jax.programs import enable_caches

    subject, programs = from_json(sys.stdin.read()), enable_caches().programs
    with Compilations() as compilations:
        try:
            began = time.perf_counter()
            pipeline = subject.pipeline(programs)
            loaded, before = time.perf_counter(), (compilations.lowering, compilations.compiling)
            next(pipeline.stream(PROMPT, SEED))
            shown = time.perf_counter()
        except StreamDiTError as mistake:
            print(json.dumps({"mistake": str(mistake)}))
            return
    lowering, compiling = (now - then for now, then in zip((compilations.lowering, compilations.compiling), before))
    parts = {
        "weights": loaded - began,
        "trace_and_lower": lowering,
        "compile_or_read": compiling,
        "run": shown - loaded - lowering - compiling,
    }
    report = {
        "at": shown,  # of a clock that all processes of a machine share
        "parts": {name: round(seconds, 3) for name, seconds in parts.items()},
        "compile_seconds": round(compilations.seconds, 3),
        "programs_found": len(programs.found) if programs else 0,
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
