"""The plain definition of windowed attention: full scores in float32, and a mask from token coordinates. The
specification.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from streamdit_jax.kernels.windows import Windows


def window_attention(query, key, value, windows: Windows, key_mask=None, segments=None):
    """See `streamdit_jax.kernels.window_attention.window_attention`. Memory grows with the square of the tokens."""
    window, region = windows.window_and_region(windows.order.coordinates)
    place = np.concatenate([window, region], axis=1)
    visible = jnp.asarray(np.all(place[:, None] == place[None], axis=-1))[None, None]
    if segments is not None:
        of_block = jnp.zeros(windows.blocks.size, jnp.int32).at[windows.blocks.ravel()].set(segments.ravel())
        of_token = jnp.repeat(of_block, windows.order.block_size)
        visible = visible & (of_token[:, None] == of_token)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest").astype(query.dtype)
