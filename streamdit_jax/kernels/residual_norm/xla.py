"""The residual norm by XLA, in the form that each compiler makes the fewest passes of.

For GPUs, a norm whose statistics are one row's mean, and then the mean of squares of what is centred, becomes one
Triton kernel that reads and writes every token once; statistics gathered together, E[x²] − E[x]², would be a reduction
of its own that reads them once more. Elsewhere it is the other way about: two sums over the same values are one
reduction. On a GPU the sum before the norm stays a kernel of its own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from streamdit_jax import sharding
from streamdit_jax.kernels.windows import TokenOrder


def residual_norm(x, branch, gate, scale, shift, order: TokenOrder, position=None, norm="layer", epsilon=1e-6):
    """See `streamdit_jax.kernels.residual_norm.residual_norm`."""
    joined = sharding.parts("tokens") > 1

    def split(tokens):
        return order.split_frames(tokens.astype(jnp.float32), joined)

    def spread(value):
        value = value.astype(jnp.float32)
        return order.spread_frames(value, joined) if value.ndim == 3 else value

    residual = split(x)
    if branch is not None:
        residual += split(branch) if gate is None else split(branch) * spread(gate)
    if position is not None:
        tables = tuple(table.astype(jnp.float32) for table in position)
        residual = _by_tokens(residual, tables, order) if joined else _add_position(residual, tables, order)
    residual = sharding.constrain(residual.astype(x.dtype).reshape(x.shape), "batch", "tokens", None)
    if sharding.target().platform == "gpu" and (branch is not None or position is not None):
        residual = jax.lax.optimization_barrier(residual)  # otherwise it is computed twice, from what it is the sum of
    hidden = normalise(split(residual), norm, epsilon) * (1 + spread(scale))
    if shift is not None:
        hidden += spread(shift)
    return residual, hidden.astype(x.dtype).reshape(x.shape)


def _by_tokens(residual, tables, order: TokenOrder):
    """`residual`, split by frames, and the sum of the tables for frame, row and column at every token."""
    frame, row, column = (order.spread(table, axis) for axis, table in enumerate(tables))
    places = sharding.constrain((frame + row + column).reshape(order.num_tokens, -1), "tokens", None)
    return residual + order.split_frames(places[None], sharding.parts("tokens") > 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _add_position(residual, tables, order: TokenOrder):
    """As `_by_tokens`. For its gradient each device sums its own examples and tokens: devices that share the batch then
    send each other rows of tables. XLA would sum over the examples first, and send the result for every token.
    """
    return _by_tokens(residual, tables, order)


def _position_gradient(order: TokenOrder, _, gradient):
    def of_device(tokens):
        return jnp.concatenate([order.sum_along(tokens, axis) for axis in range(3)])[None]

    tokens = gradient.reshape(gradient.shape[0], order.num_tokens, gradient.shape[-1])
    sums = sharding.map_shards(of_device, (tokens,), (("batch", "tokens", None),), ("batch", None, None)).sum(0)
    return gradient, tuple(jnp.split(sums, np.cumsum(order.grid)[:2]))


_add_position.defvjp(lambda residual, tables, order: (_by_tokens(residual, tables, order), None), _position_gradient)


def normalise(x: Float[Array, "*tokens d"], norm: str, epsilon: float) -> Float[Array, "*tokens d"]:
    """x over its standard deviation ("layer") or root mean square ("rms") along the last axis."""
    if norm == "rms":
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    if sharding.target().platform == "gpu":
        variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    else:
        variance = jnp.maximum(0, jnp.mean(jnp.square(x), axis=-1, keepdims=True) - jnp.square(mean))
    return (x - mean) * jax.lax.rsqrt(variance + epsilon)
