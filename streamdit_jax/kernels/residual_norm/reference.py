"""The plain definition of the residual norm: every value spread over its tokens, float32 throughout. The
specification.
"""

import jax
import jax.numpy as jnp

from streamdit_jax.kernels.windows import TokenOrder


def residual_norm(x, branch, gate, scale, shift, order: TokenOrder, position=None, norm="layer", epsilon=1e-6):
    """See `streamdit_jax.kernels.residual_norm.residual_norm`."""
    places = order.coordinates

    def of_token(value):
        value = value.astype(jnp.float32)
        return value[:, places[:, 0]] if value.ndim == 3 else value

    residual = x.astype(jnp.float32)
    if branch is not None:
        branch = branch.astype(jnp.float32)
        residual += branch if gate is None else of_token(gate) * branch
    if position is not None:
        residual += sum(table.astype(jnp.float32)[places[:, axis]] for axis, table in enumerate(position))
    centred = residual - residual.mean(-1, keepdims=True) if norm == "layer" else residual
    hidden = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    hidden = hidden * (1 + of_token(scale))
    if shift is not None:
        hidden += of_token(shift)
    return residual.astype(x.dtype), hidden.astype(x.dtype)
