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
# The command line keeps what took half a second to compile; so does this.
CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}


def first_frames(subject: str) -> dict[str, Any]:
    """Two new processes, one after the other, with a compilation cache of their own that is empty at first.

    subject: `Subject.to_json()`. The first_frame_seconds count from the start of the process, so with Python's and
    jax's own start, to the first frames on the host; `…_parts` say what they were spent on. compile_seconds: tracing,
    lowering and compiling in the cold one. Call it before this process touches the device: an accelerator's memory may
    serve one process only. Raises ConfigError with the child's line where the subject cannot run.
    """
    with tempfile.TemporaryDirectory(prefix="streamdit-bench-") as directory:
        environment = {**os.environ, **CACHE, "JAX_COMPILATION_CACHE_DIR": directory}
        cold, warm = (_run(subject, environment) for _ in range(2))
    return {
        "first_frame_seconds_cold": cold["seconds"],
        "first_frame_seconds_warm": warm["seconds"],
        "first_frame_parts_cold": cold["parts"],
        "first_frame_parts_warm": warm["parts"],
        "compile_seconds": cold["compile_seconds"],
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

    subject = from_json(sys.stdin.read())
    with Compilations() as compilations:
        try:
            began = time.perf_counter()
            pipeline = subject.pipeline()
            loaded = time.perf_counter()
            next(pipeline.stream(PROMPT, SEED))
            shown = time.perf_counter()
        except StreamDiTError as mistake:
            print(json.dumps({"mistake": str(mistake)}))
            return
    report = {
        "at": shown,  # of a clock that all processes of a machine share
        "parts": {"weights": round(loaded - began, 3), "stream": round(shown - loaded, 3)},
        "compile_seconds": round(compilations.seconds, 3),
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
