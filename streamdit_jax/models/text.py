"""A T5 encoder: what UL2, ByT5 and UMT5 share, and a small one that is trained beside the DiT.

    x ← embed(tokens);  per layer:  x ← x + attention(rms_norm(x));  x ← x + ffn(rms_norm(x));  out = rms_norm(x)
    attention = softmax(q·kᵀ + bias[bucket(j − i)])·v      no 1/√d (the initialisation of q carries it), no biases
    anywhere

T5 (arXiv 1910.10683, §2.1) with v1.1's gated FFN, ByT5's bytes (2105.13626) and UMT5's own position bias per layer
(2304.09151). Names mirror T5's, so that its weights map one to one, kernels transposed:
`block_i/attention/{query,key,value,out}`, `block_i/attention/relative_bias` (in block 0 only, unless bias_per_layer),
`block_i/ffn/{in,gate,out}`: T5 v1.1's `wi_0` is the gate (it goes through the activation) and `wi_1` is `in`; an
ungated `wi` is `in`.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

PAD, EOS, BYTE_OFFSET = 0, 1, 3  # ByT5: byte b is token b + 3; 2 is "unknown", which bytes never are

ACTIVATIONS = {"gelu": nn.gelu, "silu": nn.silu, "relu": nn.relu}  # nn.gelu is the tanh form, T5's "gelu_new"
FFNS = ("gated_gelu", "gated_silu", "gelu", "relu")  # v1.1, ByT5, UMT5: gated_gelu; UL2: gated_silu; T5: relu


@dataclass(frozen=True)
class TextConfig:
    """Shape of a text encoder; raises ValueError naming the field that is wrong. Prompts are padded to max_tokens.

    local_start: how strongly a fresh encoder's head h of layer l attends to the token h·num_heads^l places back, added
        to T5's random start of the position bias. A bias moves by a learning rate a step, so an encoder that is trained
        here, from bytes, would take thousands of steps to look at its neighbours. 0 for T5's own start; loaded weights
        are not touched.
    """

    vocab_size: int = 384
    width: int = 128
    num_layers: int = 3
    num_heads: int = 4
    head_dim: int = 32
    ffn_width: int = 256
    ffn: str = "gated_gelu"
    relative_buckets: int = 32
    relative_max_distance: int = 128
    bias_per_layer: bool = False
    max_tokens: int = 128
    local_start: float = 0.0

    def __post_init__(self):
        counts = ("vocab_size", "width", "num_layers", "num_heads", "head_dim", "ffn_width", "max_tokens")
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: got {value}; it must be a whole number ≥ 1")
        if self.ffn not in FFNS:
            raise ValueError(f"ffn: got {self.ffn!r}; choose one of {', '.join(FFNS)}")
        if self.local_start < 0:
            raise ValueError(f"local_start: got {self.local_start}; it must not be negative")
        if self.relative_buckets < 4 or self.relative_buckets % 4:
            raise ValueError(f"relative_buckets: got {self.relative_buckets}; it must be a positive multiple of 4")
        if self.relative_max_distance <= self.relative_buckets // 4:
            least = self.relative_buckets // 4 + 1
            raise ValueError(f"relative_max_distance: got {self.relative_max_distance}; it must be at least {least}")


def tokenize(text: str, max_tokens: int) -> tuple[Int[np.ndarray, "S"], Bool[np.ndarray, "S"]]:
    """ByT5's tokens of a text: its UTF-8 bytes + 3, then EOS, padded to max_tokens; and the mask of what is not
    padding.

    "" is [EOS], the unconditional prompt. ValueError when the text has more than max_tokens − 1 bytes, or lone
    surrogates.
    """
    try:
        data = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt: no valid Unicode at character {error.start}; give plain UTF-8 text") from None
    if len(data) > max_tokens - 1:
        raise ValueError(f"prompt: {len(data)} bytes, but at most {max_tokens - 1} fit; shorten it")
    tokens = np.full(max_tokens, PAD, np.int32)
    tokens[: len(data)] = np.frombuffer(data, np.uint8).astype(np.int32) + BYTE_OFFSET
    tokens[len(data)] = EOS
    return tokens, np.arange(max_tokens) <= len(data)


def with_frame_rate(text: str, frame_rate: float) -> str:
    """A caption or prompt that tells its video's frame rate, "FPS-16 a red car" (Movie Gen §3.1.3). The empty prompt,
    the one without conditions, stays empty.
    """
    return f"FPS-{frame_rate:g} {text}" if text else text


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> Int[np.ndarray, "S S"]:
    """Bucket of each (query, key) pair, bidirectional: half the buckets for keys before the query, half for keys after.

    Of each half, one half holds exact distances; the other grows logarithmically up to max_distance, and keeps all
    beyond.
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]  # key − query
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(offset)
    # float32, as T5 computes it: the floor of a logarithm that hits a whole number is decided by rounding
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    grown = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(grown, half - 1))
    return (bucket + half * (offset > 0)).astype(np.int32)


def _dense(features: int, std: float, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(features, use_bias=False, kernel_init=nn.initializers.normal(std), dtype=dtype, name=name)


def _bias_init(config: TextConfig, layer: int):
    """T5's random start of a layer's position bias [buckets, heads], and local_start."""

    def init(key, shape):
        table = nn.initializers.normal(config.width**-0.5)(key, shape)
        for head in range(config.num_heads if config.local_start else 0):
            back = head * config.num_heads**layer
            bucket = relative_buckets(back + 1, config.relative_buckets, config.relative_max_distance)[back, 0]
            table = table.at[bucket, head].add(config.local_start)
        return table

    return init


class Attention(nn.Module):
    """Self-attention with T5's position bias; returns the bias too, for the layers that share it."""

    config: TextConfig
    dtype: Any = jnp.float32
    layer: int = 0

    @nn.compact
    def __call__(
        self, x: Float[Array, "b S d"], mask: Bool[Array, "b S"], bias: Float[Array, "heads S S"] | None
    ) -> tuple[Float[Array, "b S d"], Float[Array, "heads S S"]]:
        config, width = self.config, x.shape[-1]
        inner = config.num_heads * config.head_dim
        stds = {"query": (width * config.head_dim) ** -0.5, "key": width**-0.5, "value": width**-0.5}
        q, k, v = (
            rearrange(_dense(inner, std, self.dtype, name)(x), "b s (h d) -> b s h d", h=config.num_heads)
            for name, std in stds.items()
        )
        if bias is None:
            shape = (config.relative_buckets, config.num_heads)
            table = self.param("relative_bias", _bias_init(config, self.layer), shape)
            buckets = relative_buckets(x.shape[1], config.relative_buckets, config.relative_max_distance)
            bias = rearrange(table[buckets].astype(jnp.float32), "q k h -> h q k")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) + bias
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        out = rearrange(jnp.einsum("bhqk,bkhd->bqhd", weights, v), "b s h d -> b s (h d)")
        return _dense(width, inner**-0.5, self.dtype, "out")(out), bias


class FeedForward(nn.Module):
    """out(act(in·x)), or gated: out(act(gate·x) ∘ in·x)."""

    config: TextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b S d"]) -> Float[Array, "b S d"]:
        config, width = self.config, x.shape[-1]
        activation = ACTIVATIONS[config.ffn.removeprefix("gated_")]
        h = _dense(config.ffn_width, width**-0.5, self.dtype, "in")(x)
        if config.ffn.startswith("gated_"):
            h = activation(_dense(config.ffn_width, width**-0.5, self.dtype, "gate")(x)) * h
        else:
            h = activation(h)
        return _dense(width, config.ffn_width**-0.5, self.dtype, "out")(h)


class Block(nn.Module):
    """One pre-norm layer: attention, then FFN, each with its residual."""

    config: TextConfig
    dtype: Any = jnp.float32
    layer: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b S d"], mask: Bool[Array, "b S"], bias: Float[Array, "heads S S"] | None):
        h = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name="attention_norm")(x)
        h, bias = Attention(self.config, self.dtype, self.layer, name="attention")(h, mask, bias)
        x = x + h
        h = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name="ffn_norm")(x)
        return x + FeedForward(self.config, self.dtype, name="ffn")(h), bias


class TextEncoder(nn.Module):
    """tokens int32 [b, S] and mask bool [b, S] (true = text) → float32 [b, S, width]; zero at padding.

    Padding is never attended to, so results do not depend on S. dtype is that of the computation.
    """

    config: TextConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "b S"], mask: Bool[Array, "b S"]) -> Float[Array, "b S d"]:
        config = self.config
        init = nn.initializers.normal(1.0)
        x = nn.Embed(config.vocab_size, config.width, embedding_init=init, dtype=self.dtype, name="embedding")(tokens)
        bias = None
        for layer in range(config.num_layers):
            block = Block(config, self.dtype, layer, name=f"block_{layer}")
            x, bias = block(x, mask, None if config.bias_per_layer else bias)
        x = nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name="final_norm")(x)
        return jnp.where(mask[..., None], x, 0.0).astype(jnp.float32)
