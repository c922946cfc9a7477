"""The plain definition of attention to text: full scores in float32. The specification."""

import math

import jax
import jax.numpy as jnp


def text_attention(query, key, value, reads):
    """See `streamdit_jax.kernels.text_attention.text_attention`."""
    if reads.ndim == 1:
        reads = (jnp.arange(key.shape[1]) < reads[:, None])[:, None]
    q, k, v = (x.astype(jnp.float32) for x in (query, key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, precision="highest") / math.sqrt(query.shape[-1])
    weights = jax.nn.softmax(jnp.where(reads[:, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v, precision="highest").astype(query.dtype)
