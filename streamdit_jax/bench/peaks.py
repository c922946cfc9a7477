"""What the machine reaches at its best, measured in the same run: a large matrix product, and a copy."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

# Large enough to hide a launch, small enough for a laptop: side of the square matrices, bytes of the copied array.
SIZES = {"cpu": (2048, 2**28)}
ACCELERATOR = (8192, 2**30)
REPEATS = 5


def peaks(dtype: jnp.dtype, sizes: tuple[int, int] | None = None) -> dict[str, float]:
    """{"matmul_flops_per_second", "copy_bytes_per_second"}: the best of five; a copy's bytes are read and written."""
    side, size = sizes or SIZES.get(jax.default_backend(), ACCELERATOR)
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), dtype) for key in keys)
    product = _best(jax.jit(lambda a, b: a @ b), a, b)
    x = jnp.zeros(size // 4, jnp.float32)
    copy = _best(jax.jit(lambda x: x + 1), x)
    return {"matmul_flops_per_second": 2 * side**3 / product, "copy_bytes_per_second": 2 * size / copy}


def _best(function: Callable, *arguments: jax.Array) -> float:
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)
