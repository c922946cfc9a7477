"""The machine that a number was measured on: its name, the versions that decide the number, and its memory."""

import os
import platform
import resource
import sys
from importlib import metadata

import jax

import streamdit_jax


def hardware() -> str:
    """What this process computes on, as "1 × NVIDIA H200" or "1 × cpu, x86_64, 2 cores"."""
    device = jax.devices()[0]
    kind = f"{len(jax.devices())} × {device.device_kind}"
    return f"{kind}, {platform.machine()}, {cores()} cores" if device.platform == "cpu" else kind


def cores() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Versions that decide numbers."""
    return {
        "streamdit_jax": streamdit_jax.__version__,
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "python": platform.python_version(),
    }


def available_bytes() -> int | None:
    """Memory that arrays can still take: the device's, or the host's where the device is a CPU; None where unknown."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        return 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return None


def peak_bytes() -> tuple[int, str]:
    """The most memory that was in use so far, and what was measured: "device", or "process (resident set)"."""
    statistics = jax.devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"], "device"
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "process (resident set)"
