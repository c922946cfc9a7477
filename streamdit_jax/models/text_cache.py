"""A text as the transformer's layers take it: computed once per prompt, and not in every forward (StreamDiT §8)."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from streamdit_jax.models.attention import TextKeyValue
from streamdit_jax.models.dit_config import DiTConfig
from streamdit_jax.models.embeddings import TextProjection
from streamdit_jax.sharding import constrain

# Per text encoder: its sequence [batch, tokens, width] and mask, False for padding: [batch, tokens], or, where the
# frames of a buffer have prompts of their own, [batch, frames, tokens] over the prompts side by side.
Text = tuple[tuple[Float[Array, "b s width"], Bool[Array, "b *f s"]], ...]


class CachedText(NamedTuple):
    """What a text is to every forward while it stays the same (`cache_text`): inference computes it once per prompt.

    layers: of each layer, keys and values [batch, s, heads, head_dim]. reads: how many of their first tokens all video
        tokens attend to, [batch], or, where frames have prompts of their own, to which, [batch, frames, s]. pooled:
        what joins the time embedding, [batch, 1 or frames, width]. Without cross-attention there is none of it.
    """

    layers: tuple[tuple[Array, Array], ...]
    reads: Int[Array, "b"] | Bool[Array, "b f s"] | None
    pooled: Float[Array, "b f width"] | None


def read_text(config: DiTConfig, text: Text) -> tuple[Array | None, Array | None, Array | None]:
    """The text as layers take it, within a module that has its parameters: (sequence, reads, pooled).

    Each encoder's sequence is projected to the model's width, and they are joined along the sequence (Movie Gen
    §3.1.3). The tokens that are read come before all padding, so that to attend to them takes a number and no mask.
    """
    if not config.cross_attention:
        return None, None, None
    dtype = config.compute_dtype
    projected = [
        TextProjection(config.width, config.text_projection, dtype, name=f"text_projection_{index}")(x)
        for index, (x, _) in enumerate(text)
    ]
    sequence = jnp.concatenate([constrain(x, "batch", None, None) for x in projected], axis=1)
    mask, pooled = jnp.concatenate([mask for _, mask in text], axis=-1), None
    if config.pooled_text:
        by_frame = mask if mask.ndim == 3 else mask[:, None]
        weight = by_frame / jnp.sum(by_frame, axis=-1, keepdims=True)
        mean = jnp.sum(sequence[:, None] * weight[..., None].astype(dtype), axis=2)
        pooled = nn.Dense(config.width, dtype=dtype, kernel_init=nn.initializers.zeros, name="pooled_text")(mean)
    if mask.ndim == 3:
        return sequence, mask, pooled
    order = jnp.argsort(~mask, axis=-1, stable=True)
    sequence = constrain(jax.vmap(lambda tokens, order: tokens[order])(sequence, order), "batch", None, None)
    return sequence, jnp.sum(mask, axis=-1, dtype=jnp.int32), pooled


class _TextCache(nn.Module):
    """The part of a DiT that a text alone decides; it finds its parameters among the DiT's."""

    config: DiTConfig

    @nn.compact
    def __call__(self, text: Text) -> CachedText:
        config = self.config
        sequence, reads, pooled = read_text(config, text)
        if sequence is None:
            return CachedText((), None, None)
        of_layer = TextKeyValue(config.num_heads, config.qk_norm, config.compute_dtype, parent=None)
        blocks = self.get_variable("params", "blocks")
        blocks = blocks if isinstance(blocks, tuple | list) else separate_layers(blocks)
        layers = [of_layer.apply({"params": block["cross_attention"]}, sequence) for block in blocks]
        return CachedText(tuple(layers), reads, pooled)


def cache_text(config: DiTConfig, params: Any, text: Text) -> CachedText:
    """What the transformer's forwards need of a text, computed once for as long as the text stays (§8).

    params: the transformer's, stacked or not. For StreamDiT-4B the keys and values of 768 tokens are 302 MB.
    """
    return _TextCache(config).apply({"params": params}, text)


def separate_layers(stacked: Any) -> tuple[Any, ...]:
    count = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(lambda leaf, index=index: leaf[index], stacked) for index in range(count))
