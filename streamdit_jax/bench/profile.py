"""Where the time of a forward goes, kernel by kernel, as the profiler of the accelerator tells it."""

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

FORWARDS = 3
LARGEST = 12
# The first that matches a kernel's name wins; what none matches is XLA's own fusions and the like.
KINDS = (
    ("attention", re.compile(r"sdpa|flash|fmha|attention|mosaic", re.IGNORECASE)),
    ("gemm", re.compile(r"gemm|cutlass|nvjet|xmma|cublas|wgmma|matmul|\bdot", re.IGNORECASE)),
    ("copy", re.compile(r"memcpy|memset|copy|transpose", re.IGNORECASE)),
)


def kernel_times(forward: Callable[[], None]) -> dict[str, Any] | None:
    """Milliseconds of device time per forward by kind: attention, gemm, copy, elementwise (the rest); and the LARGEST
    kernels by name. None where the backend's profiler gives no kernels, as on CPUs.

    forward: runs, and waits for, one forward that has been compiled.
    """
    if jax.default_backend() != "gpu":
        return None
    with tempfile.TemporaryDirectory(prefix="streamdit-profile-") as directory:
        with jax.profiler.trace(directory):
            for _ in range(FORWARDS):
                forward()
        kernels = []
        for path in Path(directory).rglob("*.xplane.pb"):
            kernels += _kernels(jax.profiler.ProfileData.from_file(str(path)).planes)
    return summarise(kernels, FORWARDS) if kernels else None


def _kernels(planes: Iterable[Any]) -> list[tuple[str, float]]:
    """(name, nanoseconds) of what ran on the streams of the GPUs; derived lines, which count it again, are left out."""
    return [
        (event.name, event.duration_ns)
        for plane in planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def kind(name: str) -> str:
    """What a kernel of that name computes."""
    return next((kind for kind, pattern in KINDS if pattern.search(name)), "elementwise")


def summarise(kernels: Iterable[tuple[str, float]], forwards: int) -> dict[str, Any]:
    """(name, nanoseconds) of kernels → milliseconds per forward by kind and of the largest."""
    by_kind = dict.fromkeys([*(kind for kind, _ in KINDS), "elementwise"], 0.0)
    by_name: dict[str, float] = {}
    for name, nanoseconds in kernels:
        milliseconds = nanoseconds / 1e6 / forwards
        by_kind[kind(name)] += milliseconds
        by_name[name] = by_name.get(name, 0.0) + milliseconds
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:LARGEST]
    return {
        **{f"{name}_ms": round(value, 3) for name, value in by_kind.items()},
        "largest_ms": {name: round(value, 3) for name, value in largest},
    }
