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
    return attend(query, key, value, windows, key_mask, segments, multiprocessors=_hopper().core_count)


def packed_window_attention(qkv, windows: Windows, key_mask=None, segments=None):
    """See `streamdit_jax.kernels.window_attention.packed_window_attention`."""
    return attend_packed(qkv, windows, key_mask, segments, multiprocessors=_hopper().core_count)


def _hopper() -> jax.Device:
    device = sharding.target()
    if device.platform != "gpu" or not str(getattr(device, "compute_capability", "")).startswith("9."):
        raise NotImplementedError(f"needs a Hopper GPU, not {device.device_kind}")
    return device


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
    if not query.dtype == key.dtype == value.dtype:
        raise NotImplementedError(f"takes arrays of one type, not {query.dtype}, {key.dtype} and {value.dtype}")
    how, works = _prepare(query, windows, key_mask, segments, tuning, multiprocessors, interpret)
    return _attention(how, query, key, value, works)


def attend_packed(
    qkv,
    windows: Windows,
    key_mask=None,
    segments=None,
    *,
    tuning: Tuning | None = None,
    multiprocessors: int = 132,
    interpret: Any = None,
):
    """`attend` for query, key and value side by side, [b, tokens, 3, heads, dim]."""
    how, works = _prepare(qkv, windows, key_mask, segments, tuning, multiprocessors, interpret)
    return _packed_attention(how, qkv, works)


def _prepare(array, windows, key_mask, segments, tuning, multiprocessors, interpret) -> tuple[How, "Works"]:
    if key_mask is not None:
        raise NotImplementedError("takes no key mask")
    if array.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"takes bfloat16 or float16, not {array.dtype}")
    if array.shape[-1] not in TUNING:
        raise NotImplementedError(f"takes a head_dim of {' or '.join(map(str, TUNING))}, not {array.shape[-1]}")
    how = How(tuning or TUNING[array.shape[-1]], multiprocessors, interpret)
    sizes = (how.tuning.forward.columns, how.tuning.query.columns, how.tuning.key_value.columns)
    works = {columns: work_of(windows, segments, columns) for columns in sizes}
    return how, tuple(works[columns] for columns in sizes)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed_attention(how: How, qkv, works: Works):
    [out] = _forward(how, *_apart(qkv), works, save=False)
    return out


def _apart(qkv) -> list:
    """Query, key and value as heads of one array."""
    from streamdit_jax.kernels.window_attention.mosaic_gpu_pipeline import Heads

    batch, tokens, count, heads, dim = qkv.shape
    joined = qkv.reshape(batch, tokens, count * heads, dim)
    return [Heads(joined, first, heads) for first in range(0, count * heads, heads)]


def _packed_attention_forward(how: How, qkv, works: Works):
    out, lse = _forward(how, *_apart(qkv), works, save=True)
    return out, (qkv, out, lse, works)


def _packed_attention_backward(how: How, saved, gradient):
    qkv, out, lse, works = saved
    *gradients, _ = _attention_backward(how, (*_apart(qkv), out, lse, works), gradient)
    return jnp.stack(gradients, axis=2), None


_packed_attention.defvjp(_packed_attention_forward, _packed_attention_backward)
