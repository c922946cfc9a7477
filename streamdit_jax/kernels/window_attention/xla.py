"""Windowed attention by XLA: windows become a batch axis, by a reshape or one gather of whole blocks, and XLA attends
within each.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Shaped

from streamdit_jax.kernels.windows import Windows


def window_attention(query, key, value, windows: Windows, key_mask=None, segments=None):
    """See `streamdit_jax.kernels.window_attention.window_attention`."""
    batch, size = query.shape[0], windows.order.block_size
    mask = None
    seen = windows.block_mask if segments is None else segments[:, :, None] == segments[:, None]
    if seen is not None:
        mask = repeat(jnp.asarray(seen), "n q k -> (b n) 1 (q i) (k j)", b=batch, i=size, j=size)
    if key_mask is not None:
        seen = as_batch(key_mask, windows)[:, None, None, :]
        mask = seen if mask is None else mask & seen
    out = jax.nn.dot_product_attention(*(as_batch(x, windows) for x in (query, key, value)), mask=mask)
    return as_tokens(out, windows, batch)


def as_batch(x: Shaped[Array, "b tokens *rest"], windows: Windows) -> Shaped[Array, "b*windows tokens *rest"]:
    """Windows as a batch axis: [b · windows, tokens of a window, ...]."""
    blocks, size = windows.blocks, windows.order.block_size
    if not windows.is_reshape:
        x = rearrange(x, "b (blocks size) ... -> b blocks size ...", size=size)[:, blocks.ravel()]
        x = rearrange(x, "b blocks size ... -> b (blocks size) ...")
    return rearrange(x, "b (windows tokens) ... -> (b windows) tokens ...", tokens=blocks.shape[1] * size)


def as_tokens(
    x: Shaped[Array, "b*windows tokens *rest"], windows: Windows, batch: int
) -> Shaped[Array, "b tokens *rest"]:
    """The way back from `as_batch`."""
    x = rearrange(x, "(b windows) tokens ... -> b (windows tokens) ...", b=batch)
    if windows.is_reshape:
        return x
    x = rearrange(x, "b (blocks size) ... -> b blocks size ...", size=windows.order.block_size)
    return rearrange(x[:, np.argsort(windows.blocks.ravel())], "b blocks size ... -> b (blocks size) ...")
