"""Windowed attention by cuDNN: for GPUs before Hopper, and for what the kernel of our own does not take.

Windows become a batch axis, by a reshape or one gather of whole blocks. Masks are left to XLA: cuDNN takes them as a
bias per pair of tokens, at less than half its speed.
"""

import jax

from streamdit_jax.kernels import cudnn as library
from streamdit_jax.kernels.window_attention.xla import as_batch, as_tokens
from streamdit_jax.kernels.windows import Windows


def window_attention(query, key, value, windows: Windows, key_mask=None, segments=None):
    """See `streamdit_jax.kernels.window_attention.window_attention`."""
    library.require(query)
    if key_mask is not None:
        raise NotImplementedError("takes no key mask")
    if segments is not None or windows.segments is not None:
        raise NotImplementedError("takes no windows in parts")
    arrays = (as_batch(x, windows) for x in (query, key, value))
    return as_tokens(jax.nn.dot_product_attention(*arrays, implementation="cudnn"), windows, query.shape[0])
