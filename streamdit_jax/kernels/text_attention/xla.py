"""Attention to text by XLA, which writes the scores of all video tokens and all text tokens to memory."""

import jax


def text_attention(query, key, value, reads):
    """See `streamdit_jax.kernels.text_attention.text_attention`."""
    which = {"key_value_seq_lengths": reads} if reads.ndim == 1 else {"mask": reads[:, None]}
    return jax.nn.dot_product_attention(query, key, value, implementation="xla", **which)
