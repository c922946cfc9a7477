"""Windowed attention in Pallas Mosaic for Hopper GPUs: windows are found by tables of tiles, forward and backward.

Query, key and value are read where they lie, [b, tokens, heads, dim], and the output is written there: shifted windows
cost what unshifted ones do. The gradients come from two kernels over the same tiles; each token has one window, so that
neither adds to what the other wrote, and results are the same in every run.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from streamdit_jax import sharding
from streamdit_jax.kernels.window_attention.mosaic_gpu_tiles import TUNING, Tuning, Work, work_of
from streamdit_jax.kernels.windows import Windows


@dataclasses.dataclass(frozen=True)
class How:
    """What a kernel runs on. multiprocessors: of the GPU. interpret: parameters of Pallas' GPU interpreter, or None."""

    tuning: Tuning
    multiprocessors: int
    interpret: Any = None


def window_attention(query, key, value, windows: Windows, key_mask=None, segments=None):
    """See `streamdit_jax.kernels.window_attention.window_attention`."""
    device = sharding.target()
    if device.platform != "gpu" or not str(getattr(device, "compute_capability", "")).startswith("9."):
        raise NotImplementedError(f"needs a Hopper GPU, not {device.device_kind}")
    return attend(query, key, value, windows, key_mask, segments, multiprocessors=device.core_count)


def attend(
    query,
    key,
    value,
    windows: Windows,
    key_mask=None,
    segments=None,
    *,
    tuning: Tuning | None = None,
    multiprocessors: int = 132,
    interpret: Any = None,
):
    """`window_attention` for whichever device one lowers for.

    tuning: sizes of the kernels, by default those of `TUNING` for this head_dim. interpret: parameters of Pallas' GPU
        interpreter, to run on a CPU.

    Raises NotImplementedError for what the kernels do not take.
    """
    if key_mask is not None:
        raise NotImplementedError("takes no key mask")
    if query.dtype not in (jnp.bfloat16, jnp.float16) or not query.dtype == key.dtype == value.dtype:
        raise NotImplementedError(f"takes bfloat16 or float16, not {query.dtype}")
    if query.shape[-1] not in TUNING:
        raise NotImplementedError(f"takes a head_dim of {' or '.join(map(str, TUNING))}, not {query.shape[-1]}")
    how = How(tuning or TUNING[query.shape[-1]], multiprocessors, interpret)
    sizes = (how.tuning.forward.columns, how.tuning.query.columns, how.tuning.key_value.columns)
    works = {columns: work_of(windows, segments, columns) for columns in sizes}
    return _attention(how, query, key, value, tuple(works[columns] for columns in sizes))


Works = tuple[Work, Work, Work]  # of the three kernels


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how: How, query, key, value, works: Works):
    [out] = _forward(how, query, key, value, works, save=False)
    return out


def _forward(how: How, query, key, value, works: Works, *, save: bool):
    from streamdit_jax.kernels.window_attention import mosaic_gpu_kernels as kernels  # Pallas takes a while to import

    return kernels.forward(
        query,
        key,
        value,
        works[0],
        save=save,
        stages=how.tuning.forward.stages,
        multiprocessors=how.multiprocessors,
        interpret=how.interpret,
    )


def _attention_forward(how: How, query, key, value, works: Works):
    out, lse = _forward(how, query, key, value, works, save=True)
    return out, (query, key, value, out, lse, works)


def _attention_backward(how: How, saved, gradient):
    from streamdit_jax.kernels.window_attention import mosaic_gpu_kernels as kernels

    query, key, value, out, lse, works = saved
    delta = jnp.sum(out.astype(jnp.float32) * gradient.astype(jnp.float32), axis=-1).swapaxes(1, 2)
    arrays = (query, key, value, gradient, lse, delta)
    where = dict(multiprocessors=how.multiprocessors, interpret=how.interpret)
    [dq] = kernels.query_gradient(*arrays, works[1], stages=how.tuning.query.stages, **where)
    dk, dv = kernels.key_value_gradient(*arrays, works[2], stages=how.tuning.key_value.stages, **where)
    return dq, dk, dv, None


_attention.defvjp(_attention_forward, _attention_backward)
