"""StreamDiT: real-time, endless text-to-video, in JAX and Flax (arXiv 2507.03745).

import streamdit_jax as sd
stream = sd.load("roadtrip").stream("a red car drives past green hills")
frames = next(stream)          # uint8 [frames, height, width, 3]
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["PartitionScheme", "load"]

if TYPE_CHECKING:
    from streamdit_jax.partition import PartitionScheme
    from streamdit_jax.pipeline import load


def __getattr__(name: str):
    """Loads what is asked for when it is asked for: importing the package costs no more than Python."""
    if name == "load":
        from streamdit_jax.pipeline import load

        return load
    if name == "PartitionScheme":
        from streamdit_jax.partition import PartitionScheme

        return PartitionScheme
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
