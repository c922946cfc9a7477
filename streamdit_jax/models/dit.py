"""The diffusion transformer: one module; StreamDiT-4B, roadtrip and Wan 2.1 are configurations of it (StreamDiT §4.1,
fig. 3).

Order in a block: windowed self-attention → cross-attention to text → feed-forward. Scale and shift before, and a gate
after, self-attention and feed-forward come from the time embedding, of which there is one per latent frame, because
each frame of the buffer has a flow time of its own.

The layers' parameters are stacked along a leading axis under "blocks". Stacked, the layers run as a scan with
rematerialisation, for training; as a tuple of layers (`unstack`), they run unrolled, for inference.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float

from streamdit_jax.kernels.residual_norm import residual_norm
from streamdit_jax.kernels.windows import TokenOrder, Windows
from streamdit_jax.models.attention import CrossAttention, SelfAttention
from streamdit_jax.models.dit_config import Axes, DiTConfig
from streamdit_jax.models.embeddings import FactorisedPosition, TimeEmbedding, rotary_angles
from streamdit_jax.models.linear import Linear
from streamdit_jax.models.text_cache import CachedText, Text, read_text, separate_layers
from streamdit_jax.sharding import constrain, parts

TOKENS = ("batch", "tokens", None)  # the logical axes of hidden states


class Affine(nn.Module):
    """A learnt scale and shift of every channel after a norm, [width] each; an RMS norm has no shift."""

    config: DiTConfig

    @nn.compact
    def __call__(self) -> tuple[Array, Array | None]:
        shape = (self.config.width,)
        scale = self.param("scale", nn.initializers.ones, shape)
        return scale, None if self.config.norm == "rms" else self.param("bias", nn.initializers.zeros, shape)


def _per_frame(
    function: Callable, order: TokenOrder, x: Float[Array, "b tokens d"], *values: Float[Array, "b f d"]
) -> Float[Array, "b tokens d"]:
    """`function` of every token and its frame's values."""
    joined = parts("tokens") > 1
    spread = [order.spread_frames(value, joined) for value in values]
    return function(order.split_frames(x, joined), *spread).reshape(x.shape)


class FeedForward(nn.Module):
    """Linear → tanh-GELU → Linear, or the gated SwiGLU."""

    config: DiTConfig

    @nn.compact
    def __call__(self, x: Float[Array, "b tokens width"]) -> Float[Array, "b tokens width"]:
        config, quantized = self.config, self.config.quantization != "none"
        # Quantised, what lies between the products is one pass, from scales to rounding, if nothing there is bfloat16:
        # XLA makes two passes of it otherwise.
        wide = jnp.float32 if quantized else None

        def linear(features, name, result=None):
            return Linear(features, config.compute_dtype, quantized, result, name=name)

        up = constrain(linear(config.ffn_width, "up", wide)(x), "batch", "tokens", "mlp")
        if config.ffn == "swiglu":
            up = up * nn.silu(linear(config.ffn_width, "gate", wide)(x))
        else:
            up = nn.gelu(up, approximate=True)
        return constrain(linear(config.width, "down")(up), *TOKENS)


class Modulation(nn.Module):
    """Scale, shift and gate of every frame: the shared time projection plus a learned table, or a projection of one's
    own.

    A fresh model's values are all zero: gates are closed and a block is the identity.
    """

    config: DiTConfig
    count: int

    @nn.compact
    def __call__(self, time: Float[Array, "b f width"], shared: Float[Array, "b f n width"] | None) -> list[Array]:
        width = self.config.width
        if shared is None:
            dense = nn.Dense(
                self.count * width, dtype=self.config.compute_dtype, kernel_init=nn.initializers.zeros, name="linear"
            )
            values = constrain(dense(nn.silu(time)), "batch", None, None)
            values = rearrange(values, "b f (n width) -> b f n width", n=self.count)
        else:
            table = self.param("table", nn.initializers.zeros, (self.count, width))
            values = shared + table.astype(shared.dtype)
        return [values[:, :, index] for index in range(self.count)]


class Residual(NamedTuple):
    """The residual stream [batch, tokens, width], and a branch with its gate [batch, frames, width] that it has not
    taken up yet: the norm of the next layer does that in the same pass.
    """

    x: Array
    branch: Array | None = None
    gate: Array | None = None

    def settle(self, order: TokenOrder) -> Array:
        """The stream with its branch."""
        if self.branch is None:
            return self.x
        gated = _per_frame(lambda branch, gate: branch * gate, order, self.branch, self.gate)
        return constrain(self.x + gated, *TOKENS)


class Block(nn.Module):
    """One layer: self-attention → cross-attention → feed-forward, modulated per frame (§4.1, fig. 3)."""

    config: DiTConfig
    windows: Windows

    @nn.compact
    def __call__(self, stream, time, shared, text, reads, key_mask):
        """stream: a `Residual` of tokens in token order, as the result; time [batch, frames, width]; shared [batch,
        frames, 6, width] or None; text and reads as `CrossAttention` takes them.
        """
        config, order, dtype = self.config, self.windows.order, self.config.compute_dtype
        modulation = Modulation(config, 6, name="modulation")(time, shared)
        attention_shift, attention_scale, attention_gate, ffn_shift, ffn_scale, ffn_gate = modulation
        angles = position = None
        if config.position != "rope":
            position = FactorisedPosition(order, config.grid, config.width, dtype, name="position")()
        if config.position != "learned":
            angles = rotary_angles(order, config.head_dim)
        quantized = config.quantization != "none"
        # Quantised products leave scales to what follows and want their inputs in eight bits: XLA takes both into its
        # passes. The norm before cross-attention, which is not quantised, follows such a product too.
        norm = functools.partial(residual_norm, order=order, norm=config.norm, backend="xla" if quantized else None)

        x, hidden = norm(*stream, attention_scale, attention_shift, position=position)
        attention = SelfAttention(
            config.num_heads, config.qk_norm, self.windows, dtype, quantized, name="self_attention"
        )
        stream = Residual(x, attention(hidden, angles, key_mask), attention_gate)
        if config.cross_attention:
            scale, shift = Affine(config, name="cross_norm")()
            x, hidden = norm(*stream, scale.astype(jnp.float32) - 1, shift)
            cross = CrossAttention(config.num_heads, config.qk_norm, dtype, name="cross_attention")
            stream = Residual(constrain(x + cross(hidden, text, reads), *TOKENS))
        x, hidden = norm(*stream, ffn_scale, ffn_shift)
        return Residual(x, FeedForward(config, name="feed_forward")(hidden), ffn_gate)


class DiT(nn.Module):
    """The velocity u_θ(X_τ, P, τ) of a buffer of latent frames (§3.1, §4.1).

    buckets: further (frames, height, width) of latents that it takes; each compiles once. Parameters are those of
        `config.latent`, whatever the bucket.
    """

    config: DiTConfig
    buckets: tuple[Axes, ...] = ()

    @nn.compact
    def __call__(
        self,
        latents: Float[Array, "b f h w c"],
        levels: Float[Array, "b f"],
        text: Text | CachedText,
        frame_mask: Bool[Array, "b f"] | None = None,
    ) -> Float[Array, "b f h w c"]:
        """Velocity of every latent frame, float32, in the shape of `latents`.

        latents: [batch, frames, height, width, channels]. levels: flow time of each frame, [batch, frames]; 1 = clean.
        text: per encoder its sequence and mask (see `Text`), all masks of one rank; or what `cache_text` made of it.
        frame_mask: False for frames that do not exist; no token attends to them.

        Raises ValueError for latents of another shape than the configuration's and the buckets'.
        """
        config, dtype = self.config, self.config.compute_dtype
        *bucket, channels = latents.shape[1:]
        if channels != config.latent[3] or tuple(bucket) not in (tuple(config.latent[:3]), *self.buckets):
            others = "".join(f" or {(*other, config.latent[3])}" for other in self.buckets)
            raise ValueError(f"latent: the model takes {config.latent}{others} per buffer, not {(*bucket, channels)}")
        layers = config.at(tuple(bucket)).layer_windows()
        order = layers[0].order

        x = rearrange(
            latents.astype(dtype), "b f (h ph) (w pw) c -> b f h w (ph pw c)", ph=config.patch[1], pw=config.patch[2]
        )
        x = constrain(order.arrange(x), *TOKENS)
        x = constrain(nn.Dense(config.width, dtype=dtype, name="patch_embedding")(x), *TOKENS)
        time = TimeEmbedding(config.width, config.time_frequencies, dtype, name="time_embedding")(levels)
        sequence, reads, pooled = (
            (None, text.reads, text.pooled) if isinstance(text, CachedText) else read_text(config, text)
        )
        if pooled is not None:
            time = time + pooled
        time, shared = constrain(time, "batch", None, None), None
        if config.adaln == "single":
            projection = nn.Dense(
                6 * config.width, dtype=dtype, kernel_init=nn.initializers.zeros, name="time_projection"
            )
            shared = constrain(projection(nn.silu(time)), "batch", None, None)
            shared = rearrange(shared, "b f (n width) -> b f n width", n=6)
        key_mask = None
        if frame_mask is not None:
            tokens = jnp.ones((len(latents), order.num_tokens, 1), bool)
            key_mask = _per_frame(jnp.logical_and, order, tokens, frame_mask[..., None])[..., 0]
            key_mask = constrain(key_mask, "batch", None)

        if reads is not None and reads.ndim == 3:
            reads = constrain(reads[:, order.coordinates[:, 0]], *TOKENS)  # every token reads its frame's prompt
        if isinstance(text, CachedText):
            sequence = text.layers or None
        stream = self._blocks(layers, Residual(x), sequence, (time, shared, reads, key_mask))

        shift, scale = Modulation(config, 2, name="final_modulation")(
            time, None if shared is None else time[:, :, None]
        )
        _, x = residual_norm(*stream, scale, shift, order, norm=config.norm)
        patch_values = config.patch[1] * config.patch[2] * config.latent[3]
        x = nn.Dense(patch_values, dtype=dtype, kernel_init=nn.initializers.zeros, name="velocity")(x)
        x = constrain(constrain(x, *TOKENS), "batch", None, None)  # whole again: a token's few values, not its width
        return rearrange(
            order.restore(x.astype(jnp.float32)),
            "b f h w (ph pw c) -> b f (h ph) (w pw) c",
            ph=config.patch[1],
            pw=config.patch[2],
        )

    def _blocks(self, layers: tuple[Windows, ...], stream: Residual, text: Any, inputs: tuple) -> Residual:
        """text: a sequence for all layers, or of each layer its keys and values."""
        config = self.config
        blocks = [Block(config, windows, parent=None) for windows in layers]

        def run(block, params, stream, text):
            time, shared, reads, key_mask = inputs
            return block.apply({"params": params}, stream, time, shared, text, reads, key_mask)

        def initialise(key):
            keys = jax.random.split(key, config.num_layers)
            time, shared, reads, key_mask = _first(inputs)
            given = _first(stream), time, shared, _first(text), reads, key_mask
            return jax.vmap(lambda key: blocks[0].init(key, *given)["params"])(keys)

        stacked = self.param("blocks", initialise) if self.is_initializing() else self.get_variable("params", "blocks")
        if isinstance(stacked, tuple | list):
            for index, params in enumerate(stacked):
                of_text = text[index] if isinstance(text, tuple) else text
                stream = run(blocks[index % config.period], params, stream, of_text)
            return stream
        cached = isinstance(text, tuple)

        def one_period(x, of_period):
            params, keys_values = of_period
            stream = Residual(x)
            for index, block in enumerate(blocks):
                of_layer, of_text = jax.tree.map(lambda leaf, index=index: leaf[index], (params, keys_values))
                stream = run(block, of_layer, stream, of_text if cached else text)
            return stream.settle(layers[0].order), None  # one array to carry, and to keep for the gradient

        policy = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        if config.remat != "none":
            one_period = jax.checkpoint(one_period, policy=policy[config.remat], prevent_cse=False)
        keys_values = jax.tree.map(lambda *leaves: jnp.stack(leaves), *text) if cached else None
        scanned = jax.tree.map(lambda leaf: leaf.reshape(-1, config.period, *leaf.shape[1:]), (stacked, keys_values))
        return Residual(jax.lax.scan(one_period, stream.x, scanned)[0])


def _first(tree: Any) -> Any:
    """The first example of every array: enough to initialise a block."""
    return jax.tree.map(lambda leaf: leaf[:1], tree)


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """The transformer's parameters with its layers as a tuple, for unrolled inference; the same numbers."""
    return {**params, "blocks": separate_layers(params["blocks"])}


def parameter_count(params: Any) -> int:
    """Numbers in a tree of arrays or of shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
