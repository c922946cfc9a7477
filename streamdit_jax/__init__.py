"""StreamDiT: real-time, endless text-to-video, in JAX and Flax (arXiv 2507.03745).

import streamdit_jax as sd
stream = sd.load("roadtrip").stream("a red car drives past green hills")
frames = next(stream)          # uint8 [frames, height, width, 3]
"""

import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["PartitionScheme", "load"]

if TYPE_CHECKING:
    from streamdit_jax.partition import PartitionScheme
    from streamdit_jax.pipeline import load


def _without_ynnpack(flags: str, jaxlib: str, cpu: str) -> str:
    """XLA's flags, less YNNPACK where it ends in a segmentation fault (slinky::fuse_contiguous_dims, in a transpose
    that it fuses): jaxlib 0.10.2, a training step, x86 without AVX-512. What they say of YNNPACK already is left.

    jaxlib: its version. cpu: what Linux tells of the processor, /proc/cpuinfo; "" elsewhere.
    """
    option = "--xla_cpu_experimental_ynn_fusion_type"
    if jaxlib != "0.10.2" or option in flags or "avx2" not in cpu or "avx512f" in cpu:
        return flags
    return f"{flags} {option}=".strip()


def _guard_xla() -> None:
    """Before JAX reads its flags, which it does when it first touches a device."""
    try:
        cpu, jaxlib = Path("/proc/cpuinfo").read_text(encoding="utf-8"), metadata.version("jaxlib")
    except (OSError, metadata.PackageNotFoundError):
        return
    before = os.environ.get("XLA_FLAGS", "")
    if (flags := _without_ynnpack(before, jaxlib, cpu)) != before:
        os.environ["XLA_FLAGS"] = flags


_guard_xla()


def __getattr__(name: str):
    """Loads what is asked for when it is asked for: importing the package costs no more than Python."""
    if name == "load":
        from streamdit_jax.pipeline import load

        return load
    if name == "PartitionScheme":
        from streamdit_jax.partition import PartitionScheme

        return PartitionScheme
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
