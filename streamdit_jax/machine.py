"""The machine that a number was measured on: its name, the versions that decide the number, and its memory."""

import os
import platform
import resource
import sys
from importlib import metadata

import jax

import streamdit_jax

# Dense products in bfloat16, FLOPs per second of one device, by how its name begins: TPUs from JAX's own table
# (jax.experimental.pallas.tpu.get_tpu_info; a device is a chip, but one of a chip's two cores for TPU7x), GPUs from
# NVIDIA's data sheets, without sparsity. Longer names first.
PEAK_FLOPS = {
    "TPU v4": 2.75e14,
    "TPU v5 lite": 1.97e14,
    "TPU v5e": 1.97e14,
    "TPU v5": 4.59e14,
    "TPU v6 lite": 9.20e14,
    "TPU v6e": 9.20e14,
    "TPU7x": 1.155e15,
    "NVIDIA A100": 3.12e14,
    "NVIDIA H100 PCIe": 7.56e14,
    "NVIDIA H100": 9.89e14,
    "NVIDIA H200": 9.89e14,
}


def peak_flops_per_second(device_kind: str) -> float | None:
    """The most that one device of this kind computes in bfloat16; None where unknown, as for CPUs."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device_kind.startswith(kind)), None)


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
