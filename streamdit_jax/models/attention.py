"""The transformer's two attentions: windowed self-attention over video tokens, and cross-attention to text (StreamDiT
§4.1).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from streamdit_jax.kernels.window_attention import window_attention
from streamdit_jax.kernels.windows import Windows
from streamdit_jax.models.embeddings import rotate


class QueryKeyNorm(nn.Module):
    """RMS norm of queries or keys: none; over each head ("head"); or over all heads together ("width", Wan 2.1)."""

    kind: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b s heads dim"]) -> Float[Array, "b s heads dim"]:
        if self.kind == "none":
            return x
        axes = (-2, -1) if self.kind == "width" else -1
        return nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, reduction_axes=axes, feature_axes=axes, name="norm")(x)


class SelfAttention(nn.Module):
    """Windowed, bidirectional self-attention; tokens [batch, tokens, width] in the order of `windows.order`."""

    num_heads: int
    qk_norm: str
    windows: Windows
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b tokens width"],
        angles: Float[np.ndarray, "tokens half"] | None,
        key_mask: Bool[Array, "b tokens"] | None,
    ) -> Float[Array, "b tokens width"]:
        width = x.shape[-1]
        qkv = nn.Dense(3 * width, dtype=self.dtype, name="qkv")(x)
        query, key, value = rearrange(
            qkv, "b s (three heads dim) -> three b s heads dim", three=3, heads=self.num_heads
        )
        query = QueryKeyNorm(self.qk_norm, self.dtype, name="query_norm")(query)
        key = QueryKeyNorm(self.qk_norm, self.dtype, name="key_norm")(key)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        out = window_attention(query, key, value, self.windows, key_mask)
        return nn.Dense(width, dtype=self.dtype, name="out")(rearrange(out, "b s heads dim -> b s (heads dim)"))


class CrossAttention(nn.Module):
    """Video tokens attend to text tokens; padding is masked, for all video tokens alike or, with a mask [batch, tokens,
    s], for each its own. Adds nothing until it is trained (zero output projection).
    """

    num_heads: int
    qk_norm: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x: Float[Array, "b tokens width"], text: Float[Array, "b s width"], text_mask: Bool[Array, "b *tokens s"]
    ) -> Float[Array, "b tokens width"]:
        width = x.shape[-1]
        query = nn.Dense(width, dtype=self.dtype, name="query")(x)
        query = rearrange(query, "b s (heads dim) -> b s heads dim", heads=self.num_heads)
        key_value = nn.Dense(2 * width, dtype=self.dtype, name="key_value")(text)
        key, value = rearrange(key_value, "b s (two heads dim) -> two b s heads dim", two=2, heads=self.num_heads)
        query = QueryKeyNorm(self.qk_norm, self.dtype, name="query_norm")(query)
        key = QueryKeyNorm(self.qk_norm, self.dtype, name="key_norm")(key)
        mask = text_mask[:, None] if text_mask.ndim == 3 else text_mask[:, None, None]
        out = jax.nn.dot_product_attention(query, key, value, mask=mask)
        project = nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="out")
        return project(rearrange(out, "b s heads dim -> b s (heads dim)"))
