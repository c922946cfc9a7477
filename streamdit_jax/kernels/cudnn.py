"""Where cuDNN's attention can serve. `jax.nn.dot_product_attention(implementation="cudnn")` needs the library already
when it is traced.
"""

import functools

import jax
import jax.numpy as jnp

from streamdit_jax import sharding

HALVES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))
HOPPER = (9, 0)


def compute_capability(device: jax.Device) -> tuple[int, int]:
    """Of a GPU, there or described: (9, 0) is Hopper."""
    major, minor = str(device.compute_capability).split(".")
    return int(major), int(minor)


def require(query: jax.Array) -> None:
    """NotImplementedError, saying why, where cuDNN's attention does not take queries [batch, tokens, heads, dim] on the
    device that one traces for.
    """
    target = sharding.target()
    if target.platform != "gpu":
        raise NotImplementedError(f"needs an NVIDIA GPU, not a {target.platform}")
    if query.dtype not in HALVES:
        raise NotImplementedError(f"takes bfloat16 and float16, not {query.dtype}")
    most = 256 if compute_capability(target) >= HOPPER else 128
    if query.shape[-1] % 8 or query.shape[-1] > most:
        raise NotImplementedError(f"takes heads of a multiple of 8 up to {most}, not {query.shape[-1]}")
    if not _found():
        raise NotImplementedError("the cuDNN library is not there: pip install nvidia-cudnn-cu13")


@functools.cache
def _found() -> bool:
    """Whether JAX's CUDA plugin has loaded the library."""
    from jax._src.lib import cuda_versions  # there is no public way to ask

    try:
        return bool(cuda_versions and cuda_versions.cudnn_get_version())
    except RuntimeError:
        return False
