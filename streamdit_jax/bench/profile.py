"""Where the time of a forward goes, kernel by kernel, as the profiler of the accelerator tells it."""

import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

FORWARDS = 3
LARGEST = 12
# The first that matches a kernel's name, or what XLA calls its instruction, wins; what none matches is XLA's own
# fusions and the like.
KINDS = (
    ("elementwise", re.compile(r"residual_norm", re.IGNORECASE)),
    ("cross_attention", re.compile(r"text_attention|cross_attention.*(sdpa|flash|fmha)", re.IGNORECASE)),
    ("attention", re.compile(r"sdpa|flash|fmha|attention|mosaic", re.IGNORECASE)),
    ("fp8_gemm", re.compile(r"e4m3|nvjet_qq|matmul\W*f8", re.IGNORECASE)),
    ("gemm", re.compile(r"gemm|cutlass|nvjet|xmma|cublas|wgmma|matmul|\bdot", re.IGNORECASE)),
    ("copy", re.compile(r"memcpy|memset|copy|transpose", re.IGNORECASE)),
)
# What names cannot always tell apart is held against the roofline together.
TOGETHER = {
    "attention": ("attention", "cross_attention"),
    "gemm": ("gemm", "fp8_gemm"),
    "elementwise": ("elementwise", "copy"),
}


def kernel_times(forward: Callable[[], None]) -> dict[str, Any] | None:
    """Milliseconds of device time per forward by kind: attention, cross_attention, gemm, fp8_gemm, copy, elementwise
    (the rest); and the LARGEST kernels by name. None where the backend's profiler gives no kernels, as on CPUs.

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


def _kernels(planes: Iterable[Any]) -> list[tuple[str, str, float]]:
    """(name, instruction, nanoseconds) of what ran on the streams of the GPUs; derived lines, which count it again, are
    left out.
    """
    return [
        (event.name, _instruction(event), event.duration_ns)
        for plane in planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]


def _instruction(event: Any) -> str:
    """What XLA tells of the instruction that a kernel is of; "" where it tells nothing."""
    told = dict(event.stats)
    return " ".join(str(told[name]) for name in ("tf_op", "hlo_op") if name in told)


def kind(name: str, instruction: str = "") -> str:
    """What a kernel of that name computes, for that instruction."""
    whole = f"{instruction} {name}"
    return next((kind for kind, pattern in KINDS if pattern.search(whole)), "elementwise")


def against(measured: dict[str, Any], bounds: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{kind: {"measured_ms", "bound_ms", "times"}}: of `kernel_times`, beside the kinds of `roofline.bound`."""
    table = {}
    for name, kinds in TOGETHER.items():
        took = sum(measured[f"{each}_ms"] for each in kinds)
        least = sum(bounds["kinds"][each]["ms"] for each in kinds if each in bounds["kinds"])
        if least:
            table[name] = {"measured_ms": round(took, 3), "bound_ms": round(least, 3), "times": round(took / least, 3)}
    return table


def summarise(kernels: Iterable[tuple[str, str, float]], forwards: int) -> dict[str, Any]:
    """(name, instruction, nanoseconds) of kernels → milliseconds per forward by kind and of the largest."""
    by_kind = dict.fromkeys([*(kind for kind, _ in KINDS), "elementwise"], 0.0)
    by_name: dict[str, float] = {}
    for name, instruction, nanoseconds in kernels:
        milliseconds = nanoseconds / 1e6 / forwards
        by_kind[kind(name, instruction)] += milliseconds
        by_name[name] = by_name.get(name, 0.0) + milliseconds
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:LARGEST]
    return {
        **{f"{name}_ms": round(value, 3) for name, value in by_kind.items()},
        "largest_ms": {name: round(value, 3) for name, value in largest},
    }
