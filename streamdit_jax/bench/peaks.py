"""What the machine reaches at its best, measured in the same run: a large matrix product, and a copy."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from streamdit_jax.models.linear import FLOAT8

# Large enough to hide a launch, small enough for a laptop: side of the square matrices, bytes of the copied array.
SIZES = {"cpu": (2048, 2**28)}
ACCELERATOR = (8192, 2**30)
REPEATS = 5


def peaks(dtype: jnp.dtype, sizes: tuple[int, int] | None = None) -> dict[str, float]:
    """{"matmul_flops_per_second", "copy_bytes_per_second"}: the best of five; a copy's bytes are read and written."""
    side, size = sizes or SIZES.get(jax.default_backend(), ACCELERATOR)
    x = jnp.zeros(size // 4, jnp.float32)
    copy = best_seconds(jax.jit(lambda x: x + 1), x)
    return {"matmul_flops_per_second": product_rate(dtype, side), "copy_bytes_per_second": 2 * size / copy}


def product_rate(dtype: jnp.dtype, side: int | None = None) -> float:
    """FLOP/s of a product of square matrices of random numbers. float8_e4m3fn is multiplied as `models.linear` does:
    converted, which XLA takes into the product where the hardware can, and the second matrix as [out, in].
    """
    side = side or SIZES.get(jax.default_backend(), ACCELERATOR)[0]
    narrow = dtype == FLOAT8
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (side, side), jnp.bfloat16 if narrow else dtype).astype(dtype) for key in keys)

    def product(a, b):
        if narrow:
            a, b = a.astype(jnp.bfloat16), b.astype(jnp.bfloat16)
        return jax.lax.dot_general(a, b, (((1,), (1 if narrow else 0,)), ((), ())))

    return 2 * side**3 / best_seconds(jax.jit(product), a, b)


def best_seconds(function: Callable, *arguments: jax.Array) -> float:
    """The least seconds of five calls, each waited for, after one that compiles."""
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - began)
    return min(times)
