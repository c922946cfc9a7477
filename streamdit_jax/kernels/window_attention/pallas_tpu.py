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


def window_attention(query, key, value, windows: Windows, key_mask=None, segments=None, *, interpret: bool = False):
    """See `streamdit_jax.kernels.window_attention.window_attention`. interpret: as `pallas_call` takes it, to run on
    any device, for tests.
    """
    platform = sharding.target().platform
    if platform != "tpu" and not interpret:
        raise NotImplementedError(f"not for {platform}")
    case, table = case_of(query, key, value, windows, segments, interpret)
    segments = windows.segments if segments is None else segments
    ranges = None
    if segments is not None:
        order, ranges = by_part(jnp.asarray(segments, jnp.int32))
        table = jnp.take_along_axis(table, order, axis=1)
    bias = None
    if key_mask is not None:
        pieces = rearrange(jnp.where(key_mask, 0.0, MASKED), "b (pieces size) -> b pieces size", size=case.size)
        bias = rearrange(pieces[:, table], "b windows pieces size -> b windows 1 (pieces size)")
    flat = (rearrange(x, "b tokens heads dim -> b tokens (heads dim)") for x in (query, key, value))
    out = _attend(case, table.ravel(), ranges, *flat, bias)
    return rearrange(out, "b tokens (heads dim) -> b tokens heads dim", heads=case.heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(case: Case, table, ranges, query, key, value, bias):
    return _attend_forward(case, table, ranges, query, key, value, bias)[0]


def _attend_forward(case, table, ranges, query, key, value, bias):
    from streamdit_jax.kernels.window_attention import pallas_tpu_kernels as kernels

    out, lse = kernels.forward(case, table, ranges, query, key, value, bias)
    return out, (table, ranges, query, key, value, bias, out, lse)


def _attend_backward(case, saved, gradient):
    from streamdit_jax.kernels.window_attention import pallas_tpu_kernels as kernels

    query, key, value = kernels.backward(case, *saved, gradient)
    return None, None, query, key, value, None


_attend.defvjp(_attend_forward, _attend_backward)
