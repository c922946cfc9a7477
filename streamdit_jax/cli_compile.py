"""`streamdit compile`: fills the caches of compiled code ahead of time, so that the first start is a warm one."""

import time
from pathlib import Path
from typing import Any

import jax

from streamdit_jax.errors import ConfigError
from streamdit_jax.programs import Programs


def compile_ahead(
    model: str, programs: Programs | None, *, scheme: str | None = None, filling: str | None = None, sessions: int = 1
) -> dict[str, Any]:
    """Compiles what `streamdit stream` and, for so many sessions, `streamdit serve` run, and runs it once; what is
    there already is left. What was written, and where, as a JSON-able dict.

    programs: of `enable_caches`; ConfigError where there are none, for a scheme, filling or number of sessions that
    cannot be; CheckpointError for a model that is none.
    """
    from streamdit_jax.live import Engine
    from streamdit_jax.pipeline import load

    if programs is None:
        raise ConfigError("compile: there is no directory to keep compiled code in; see above")
    executables = Path(jax.config.jax_compilation_cache_dir)
    began, before = time.perf_counter(), _executables(executables)
    pipeline = load(model, programs=programs)
    with Engine(pipeline, slots=sessions, scheme=scheme, filling=filling):
        pass  # it compiles every size before it starts
    stream = pipeline.stream("", scheme=scheme, filling=filling)
    for _ in range(2 if stream.scheme.num_references else 1):  # references are decoded, too
        next(stream)
    made = _executables(executables) - before
    return {
        "model": model,
        "scheme": str(stream.scheme),
        "filling": stream.table.filling,
        "sessions": sessions,
        "programs": str(programs.directory),
        "programs_written": len(programs.written),
        "programs_found": len(programs.found),
        "executables": str(executables),
        "executables_written": len(made),
        "seconds": round(time.perf_counter() - began, 2),
    }


def _executables(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*-cache")}


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    programs = f"{report['programs_written']} programs written, {report['programs_found']} found"
    return (
        f"{report['model']}, {report['scheme']}, {report['filling']} filling, {report['sessions']} sessions: "
        f"{report['seconds']:.1f} s\n"
        f"{report['programs']}: {programs}\n"
        f"{report['executables']}: {report['executables_written']} executables written"
    )
