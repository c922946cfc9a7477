"""Windowed attention by XLA: windows become a batch axis, by a reshape or one gather of whole blocks, and XLA attends
within each.
"""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from streamdit_jax.kernels.windows import Windows


def window_attention(query, key, value, windows: Windows, key_mask=None, segments=None):
    """See `streamdit_jax.kernels.window_attention.window_attention`."""
    batch, size = query.shape[0], windows.order.block_size
    blocks = windows.blocks.ravel()
    per_window = windows.blocks.shape[1]

    def gather(x):
        if not windows.is_reshape:
            x = rearrange(x, "b (blocks size) ... -> b blocks size ...", size=size)[:, blocks]
            x = rearrange(x, "b blocks size ... -> b (blocks size) ...")
        return rearrange(x, "b (windows tokens) ... -> (b windows) tokens ...", tokens=per_window * size)

    mask = None
    seen = windows.block_mask if segments is None else segments[:, :, None] == segments[:, None]
    if seen is not None:
        mask = repeat(jnp.asarray(seen), "n q k -> (b n) 1 (q i) (k j)", b=batch, i=size, j=size)
    if key_mask is not None:
        seen = gather(key_mask)[:, None, None, :]
        mask = seen if mask is None else mask & seen
    out = jax.nn.dot_product_attention(gather(query), gather(key), gather(value), mask=mask)
    out = rearrange(out, "(b windows) tokens h d -> b (windows tokens) h d", b=batch)
    if windows.is_reshape:
        return out
    out = rearrange(out, "b (blocks size) h d -> b blocks size h d", size=size)[:, np.argsort(blocks)]
    return rearrange(out, "b blocks size h d -> b (blocks size) h d")
