"""The transformer's two attentions: windowed self-attention over video tokens, and cross-attention to text (StreamDiT
§4.1).
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from streamdit_jax.kernels import window_parallel
from streamdit_jax.kernels.text_attention import text_attention
from streamdit_jax.kernels.windows import Windows
from streamdit_jax.models.embeddings import rotate
from streamdit_jax.models.linear import Linear, Weights, declare, multiply
from streamdit_jax.sharding import constrain, map_shards, parts

HEADS = ("batch", "tokens", "heads", None)


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


class HeadProjections(nn.Module):
    """`count` linear maps side by side, each onto the heads of `width`; their parameters are those of one `Linear`.

    Where devices share the heads, each needs some outputs of every map, and these do not lie side by side: the weights
    are regrouped for them, not what they make of the tokens.
    """

    count: int
    width: int
    num_heads: int
    dtype: jnp.dtype
    quantized: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b s inputs"]) -> Float[Array, "n b s heads dim"]:
        count, width = self.count, self.width
        weights = declare(self, x.shape[-1], count * width, self.quantized)
        if parts("heads") > 1:
            weights = _by_map(weights, count, self.dtype)
        out = multiply(x, weights, self.dtype).reshape(*x.shape[:2], count, width)
        return rearrange(out, "b s n (heads dim) -> n b s heads dim", heads=self.num_heads)


def _by_map(weights: Weights, count: int, dtype: jnp.dtype) -> Weights:
    """The weights of maps side by side, with an axis over the maps: [count, width] where it was [count · width]."""
    bias = constrain(weights.bias.astype(dtype).reshape(count, -1), None, "heads")
    if weights.input_scale is None:
        kernel = weights.kernel.astype(dtype).reshape(-1, count, bias.shape[-1])  # sent as what is multiplied
        kernel = constrain(kernel, "embed", None, "heads")
        return Weights(kernel, bias)
    kernel = constrain(weights.kernel.reshape(count, -1, weights.kernel.shape[-1]), None, "heads", "embed")
    scale = constrain(weights.kernel_scale.reshape(count, -1), None, "heads")
    return Weights(kernel, bias, scale, weights.input_scale)


class SelfAttention(nn.Module):
    """Windowed, bidirectional self-attention; tokens [batch, tokens, width] in the order of `windows.order`."""

    num_heads: int
    qk_norm: str
    windows: Windows
    dtype: jnp.dtype
    quantized: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b tokens width"],
        angles: Float[np.ndarray, "tokens half"] | None,
        key_mask: Bool[Array, "b tokens"] | None,
    ) -> Float[Array, "b tokens width"]:
        width = x.shape[-1]
        x = window_parallel.to_windows(x, self.windows)
        qkv = HeadProjections(3, width, self.num_heads, self.dtype, self.quantized, name="qkv")(x)
        if self.qk_norm == "none" and angles is None:  # attention may read them where they are
            qkv = rearrange(qkv, "n b s heads dim -> b s n heads dim")
            out = window_parallel.packed_window_attention(qkv, self.windows, key_mask)
        else:
            query, key, value = (constrain(part, *HEADS) for part in qkv)
            query = QueryKeyNorm(self.qk_norm, self.dtype, name="query_norm")(query)
            key = QueryKeyNorm(self.qk_norm, self.dtype, name="key_norm")(key)
            if angles is not None:
                angles = window_parallel.in_windows(angles, self.windows)
                query, key = rotate(query, angles), rotate(key, angles)
            out = window_parallel.window_attention(query, key, value, self.windows, key_mask)
        project = Linear(width, self.dtype, self.quantized, name="out")
        out = project(rearrange(out, "b s heads dim -> b s (heads dim)"))
        return window_parallel.from_windows(constrain(out, "batch", "tokens", None), self.windows)


class TextKeyValue(nn.Module):
    """Keys and values of a text for one layer, each [batch, s, heads, head_dim]; its parameters are a part of
    `CrossAttention`'s, under the same names.
    """

    num_heads: int
    qk_norm: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, text: Float[Array, "b s width"]) -> tuple[Array, Array]:
        return _keys_and_values(text, self.num_heads, self.qk_norm, self.dtype)


def _keys_and_values(text: Array, num_heads: int, qk_norm: str, dtype: jnp.dtype) -> tuple[Array, Array]:
    key_value = HeadProjections(2, text.shape[-1], num_heads, dtype, name="key_value")(text)
    key, value = (constrain(part, "batch", None, "heads", None) for part in key_value)
    return QueryKeyNorm(qk_norm, dtype, name="key_norm")(key), value


class CrossAttention(nn.Module):
    """Video tokens attend to text tokens. Adds nothing until it is trained (zero output projection)."""

    num_heads: int
    qk_norm: str
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b tokens width"],
        text: Float[Array, "b s width"] | tuple[Array, Array],
        reads: Int[Array, "b"] | Bool[Array, "b tokens s"],
    ) -> Float[Array, "b tokens width"]:
        """text: a sequence, or what `TextKeyValue` made of it. reads: how many of its first tokens all video tokens
        attend to, or, for each video token, to which.
        """
        width = x.shape[-1]
        query = nn.Dense(width, dtype=self.dtype, name="query")(x)
        query = constrain(rearrange(query, "b s (heads dim) -> b s heads dim", heads=self.num_heads), *HEADS)
        query = QueryKeyNorm(self.qk_norm, self.dtype, name="query_norm")(query)
        if isinstance(text, tuple):
            key, value = text
        else:
            key, value = _keys_and_values(text, self.num_heads, self.qk_norm, self.dtype)
        text_axes = ("batch", None, "heads", None)
        axes = HEADS, text_axes, text_axes, ("batch", "tokens", None)[: reads.ndim]
        out = map_shards(text_attention, (query, key, value, reads), axes, HEADS)  # no backend sees a mesh
        project = nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.zeros, name="out")
        return constrain(project(rearrange(out, "b s heads dim -> b s (heads dim)")), "batch", "tokens", None)
