"""Windowed attention in Pallas for TPUs: the backend, and its gradient (StreamDiT §4.1).

`pallas_tpu_case` says which windows it takes and how they are cut; `pallas_tpu_kernels` computes, and is imported only
where it does, because Pallas takes a third of a second.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange

from streamdit_jax import sharding
from streamdit_jax.kernels.window_attention.pallas_tpu_case import Case, by_part, case_of
from streamdit_jax.kernels.windows import Windows

MASKED = -1e30  # finite: a query that sees no key gets the mean of the values, not NaN


def window_attention(query, key, value, windows: Windows, key_mask=None, segments=None, *, interpret=False):
    """See `streamdit_jax.kernels.window_attention.window_attention`. interpret: as `pallas_call` takes it, to run on
    any device, for tests.
    """
    if not query.dtype == key.dtype == value.dtype:
        raise NotImplementedError(f"{query.dtype}, {key.dtype} and {value.dtype}, not of one type")
    return _within((query, key, value), windows, key_mask, segments, interpret)


def packed_window_attention(qkv, windows: Windows, key_mask=None, segments=None, *, interpret=False):
    """See `streamdit_jax.kernels.window_attention.packed_window_attention`; interpret as above."""
    return _within((qkv,), windows, key_mask, segments, interpret)


def _within(qkv: tuple, windows: Windows, key_mask, segments, interpret):
    """qkv: query, key, value [b, tokens, heads, dim], or one array [b, tokens, 3, heads, dim]."""
    platform = sharding.target().platform
    if platform != "tpu" and not interpret:
        raise NotImplementedError(f"not for {platform}")
    batch, *_, heads, dim = qkv[0].shape
    case, table = case_of((batch, heads, dim), qkv[0].dtype, windows, segments is not None, interpret)
    segments = windows.segments if segments is None else segments
    ranges = None
    if segments is not None:
        order, ranges = by_part(jnp.asarray(segments, jnp.int32))
        table = jnp.take_along_axis(table, order, axis=1)
    bias = None
    if key_mask is not None:
        pieces = rearrange(jnp.where(key_mask, 0.0, MASKED), "b (pieces size) -> b pieces size", size=case.size)
        bias = rearrange(pieces[:, table], "b windows pieces size -> b windows 1 (pieces size)")
    out = _attend(case, table.ravel(), ranges, tuple(x.reshape(*x.shape[:2], -1) for x in qkv), bias)
    return rearrange(out, "b tokens (heads dim) -> b tokens heads dim", heads=heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(case: Case, table, ranges, qkv, bias):
    return _attend_forward(case, table, ranges, qkv, bias)[0]


def _attend_forward(case, table, ranges, qkv, bias):
    from streamdit_jax.kernels.window_attention import pallas_tpu_kernels as kernels

    out, lse = kernels.forward(case, table, ranges, qkv, bias)
    return out, (table, ranges, qkv, bias, out, lse)


def _attend_backward(case, saved, gradient):
    from streamdit_jax.kernels.window_attention import pallas_tpu_kernels as kernels

    return None, None, tuple(kernels.backward(case, *saved, gradient)), None


_attend.defvjp(_attend_forward, _attend_backward)
