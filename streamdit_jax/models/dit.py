"""The diffusion transformer: one module; StreamDiT-4B, roadtrip and Wan 2.1 are configurations of it (StreamDiT §4.1,
fig. 3).

Order in a block: windowed self-attention → cross-attention to text → feed-forward. Scale and shift before, and a gate
after, self-attention and feed-forward come from the time embedding, of which there is one per latent frame, because
each frame of the buffer has a flow time of its own.

The layers' parameters are stacked along a leading axis under "blocks". Stacked, the layers run as a scan with
rematerialisation, for training; as a tuple of layers (`unstack`), they run unrolled, for inference.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from streamdit_jax.kernels.residual_norm import residual_norm
from streamdit_jax.kernels.windows import TokenOrder, Windows
from streamdit_jax.models.attention import CrossAttention, SelfAttention, TextKeyValue
from streamdit_jax.models.embeddings import FactorisedPosition, TextProjection, TimeEmbedding, rotary_angles
from streamdit_jax.models.linear import Linear
from streamdit_jax.sharding import constrain, parts

Axes = tuple[int, int, int]
TOKENS = ("batch", "tokens", None)  # the logical axes of hidden states
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


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Shapes and choices of the transformer. Raises ValueError, beginning with the field's name, for what cannot be
    built.

    latent: (frames, height, width, channels) of the buffer. patch: tokens per latent, (1, ph, pw): every frame has a
        level of its own.
    windows, shifted: per layer, repeated as patterns over the layers; a shifted layer moves its windows by half a
        window per axis.
    wrap: per axis, whether shifted windows wrap around (see `kernels.windows.Windows`).
    qk_norm: none | head | width. position: learned | rope. adaln: single | per_block. norm: layer | rms, without
        affine.
    ffn: gelu | swiglu. text_projection: linear_norm | mlp. remat: none | dots | full, for the scanned layers.
    pooled_text: the mean of the text joins the time embedding, so that a prompt reaches every modulation at once
        (chosen; not in the paper, and off in its configuration).
    dtype: auto (bfloat16 on accelerators, float32 on CPUs) | float32 | bfloat16: the type of the arithmetic, not of
        the parameters.
    quantization: none | fp8: whether the projections of self-attention and feed-forward are quantised (see
        `models.linear`), which `streamdit quantize` makes and training refuses.
    """

    latent: tuple[int, int, int, int]
    patch: Axes
    width: int
    num_layers: int
    num_heads: int
    ffn_width: int
    windows: tuple[Axes, ...]
    shifted: tuple[bool, ...] = (False, True)
    wrap: tuple[bool, bool, bool] = (True, True, True)
    cross_attention: bool = True
    norm: str = "layer"
    ffn: str = "gelu"
    adaln: str = "single"
    position: str = "learned"
    qk_norm: str = "none"
    text_projection: str = "linear_norm"
    pooled_text: bool = False
    time_frequencies: int = 256
    remat: str = "full"
    dtype: str = "auto"
    quantization: str = "none"

    def __post_init__(self):
        choices = {
            "norm": ("layer", "rms"),
            "ffn": ("gelu", "swiglu"),
            "adaln": ("single", "per_block"),
            "position": ("learned", "rope"),
            "qk_norm": ("none", "head", "width"),
            "text_projection": ("linear_norm", "mlp"),
            "remat": ("none", "dots", "full"),
            "dtype": ("auto", "float32", "bfloat16"),
            "quantization": ("none", "fp8"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: {getattr(self, field)!r} is not one of {', '.join(allowed)}")
        for field, count in (("latent", 4), ("patch", 3), ("wrap", 3)):
            if len(getattr(self, field)) != count:
                raise ValueError(
                    f"{field}: needs {count} values, not the {len(getattr(self, field))} of {getattr(self, field)}"
                )
        for field in ("width", "num_layers", "num_heads", "ffn_width"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: must be at least 1, not {getattr(self, field)}")
        if self.time_frequencies < 2 or self.time_frequencies % 2:
            raise ValueError(f"time_frequencies: must be even and positive, not {self.time_frequencies}")
        if min(self.latent) < 1:
            raise ValueError(f"latent: every size must be at least 1, not {self.latent}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads: {self.num_heads} heads do not divide a width of {self.width}")
        if self.position == "rope" and self.head_dim % 2:
            raise ValueError(f"num_heads: rotary positions need an even head size, not {self.head_dim}")
        if self.patch[0] != 1:
            raise ValueError(f"patch: must be 1 along time, where every frame has its own level, not {self.patch[0]}")
        for axis, size, patch in zip(("height", "width"), self.latent[1:3], self.patch[1:]):
            if patch < 1 or size % patch:
                raise ValueError(f"patch: {patch} does not divide a latent {axis} of {size}")
        if not self.windows or any(len(window) != 3 for window in self.windows):
            raise ValueError(f"windows: needs at least one (frames, height, width), not {self.windows}")
        if self.pooled_text and not self.cross_attention:
            raise ValueError("pooled_text: needs the text that cross_attention = False leaves out")
        if not self.shifted:
            raise ValueError("shifted: needs at least one of False and True")
        if self.num_layers % self.period:
            raise ValueError(
                f"num_layers: {self.num_layers} layers do not hold whole patterns of {self.period} (windows, shifted)"
            )
        self.layer_windows()

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def grid(self) -> Axes:
        """Tokens along time, height and width."""
        return tuple(size // patch for size, patch in zip(self.latent[:3], self.patch))

    @property
    def period(self) -> int:
        """Layers after which the pattern of windows and shifts repeats."""
        return math.lcm(len(self.windows), len(self.shifted))

    @property
    def compute_dtype(self) -> jnp.dtype:
        if self.dtype == "auto":
            return jnp.dtype(jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        return jnp.dtype(self.dtype)

    def at(self, bucket: Axes) -> "DiTConfig":
        """The configuration of a smaller buffer of (frames, height, width), which the same parameters serve: windows
        end where the grid does. ValueError, beginning with "latent" or "windows", where it cannot be one.
        """
        if len(bucket) != 3 or any(size > whole for size, whole in zip(bucket, self.latent)):
            raise ValueError(f"latent: {tuple(bucket)} does not fit into the model's {self.latent[:3]}")
        grid = tuple(max(1, size // patch) for size, patch in zip(bucket, self.patch))
        windows = tuple(tuple(map(min, window, grid)) for window in self.windows)
        return dataclasses.replace(self, latent=(*bucket, self.latent[3]), windows=windows)

    def layer_windows(self) -> tuple[Windows, ...]:
        """The windows of each layer of one period, over one token order that serves them all."""
        layers = []
        for index in range(self.period):
            window, shifted = self.windows[index % len(self.windows)], self.shifted[index % len(self.shifted)]
            TokenOrder(self.grid, window, window)  # raises where the window does not divide the grid
            # A window as long as its axis sees all of it already; moving it would change nothing, or cut it in two.
            shift = tuple(size // 2 if shifted and size < whole else 0 for size, whole in zip(window, self.grid))
            for axis, size, moved in zip(("time", "height", "width"), window, shift):
                if moved and size % 2:
                    raise ValueError(f"windows: a window of {size} along {axis} has no half to shift by; make it even")
            layers.append((window, shift))
        block = tuple(
            math.gcd(*(value for window, shift in layers for value in (window[axis], shift[axis]))) for axis in range(3)
        )
        order = TokenOrder(self.grid, layers[0][0], block)
        return tuple(Windows(order, window, shift, self.wrap) for window, shift in layers)


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


class Stream(NamedTuple):
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
        """stream: a `Stream` of tokens in token order, as the result; time [batch, frames, width]; shared [batch,
        frames, 6, width] or None; text and reads as `CrossAttention` takes them.
        """
        config, order, dtype = self.config, self.windows.order, self.config.compute_dtype
        modulation = Modulation(config, 6, name="modulation")(time, shared)
        attention_shift, attention_scale, attention_gate, ffn_shift, ffn_scale, ffn_gate = modulation
        angles = position = None
        if config.position == "learned":
            position = FactorisedPosition(order, config.grid, config.width, dtype, name="position")()
        else:
            angles = rotary_angles(order, config.head_dim)
        quantized = config.quantization != "none"
        # Quantised products leave scales to what follows and want their inputs in eight bits: XLA takes both into its
        # passes. The norm before cross-attention, which is not quantised, follows such a product too.
        norm = functools.partial(residual_norm, order=order, norm=config.norm, backend="xla" if quantized else None)

        x, hidden = norm(*stream, attention_scale, attention_shift, position=position)
        attention = SelfAttention(
            config.num_heads, config.qk_norm, self.windows, dtype, quantized, name="self_attention"
        )
        stream = Stream(x, attention(hidden, angles, key_mask), attention_gate)
        if config.cross_attention:
            scale, shift = Affine(config, name="cross_norm")()
            x, hidden = norm(*stream, scale.astype(jnp.float32) - 1, shift)
            cross = CrossAttention(config.num_heads, config.qk_norm, dtype, name="cross_attention")
            stream = Stream(constrain(x + cross(hidden, text, reads), *TOKENS))
        x, hidden = norm(*stream, ffn_scale, ffn_shift)
        return Stream(x, FeedForward(config, name="feed_forward")(hidden), ffn_gate)


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
            (None, text.reads, text.pooled) if isinstance(text, CachedText) else _read(config, text)
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
        stream = self._blocks(layers, Stream(x), sequence, (time, shared, reads, key_mask))

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

    def _blocks(self, layers: tuple[Windows, ...], stream: Stream, text: Any, inputs: tuple) -> Stream:
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
            stream = Stream(x)
            for index, block in enumerate(blocks):
                of_layer, of_text = jax.tree.map(lambda leaf, index=index: leaf[index], (params, keys_values))
                stream = run(block, of_layer, stream, of_text if cached else text)
            return stream.settle(layers[0].order), None  # one array to carry, and to keep for the gradient

        policy = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}
        if config.remat != "none":
            one_period = jax.checkpoint(one_period, policy=policy[config.remat], prevent_cse=False)
        keys_values = jax.tree.map(lambda *leaves: jnp.stack(leaves), *text) if cached else None
        scanned = jax.tree.map(lambda leaf: leaf.reshape(-1, config.period, *leaf.shape[1:]), (stacked, keys_values))
        return Stream(jax.lax.scan(one_period, stream.x, scanned)[0])


def _read(config: DiTConfig, text: Text) -> tuple[Array | None, Array | None, Array | None]:
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
        sequence, reads, pooled = _read(config, text)
        if sequence is None:
            return CachedText((), None, None)
        of_layer = TextKeyValue(config.num_heads, config.qk_norm, config.compute_dtype, parent=None)
        blocks = self.get_variable("params", "blocks")
        blocks = blocks if isinstance(blocks, tuple | list) else _layers(blocks)
        layers = [of_layer.apply({"params": block["cross_attention"]}, sequence) for block in blocks]
        return CachedText(tuple(layers), reads, pooled)


def cache_text(config: DiTConfig, params: Any, text: Text) -> CachedText:
    """What the transformer's forwards need of a text, computed once for as long as the text stays (§8).

    params: the transformer's, stacked or not. For StreamDiT-4B the keys and values of 768 tokens are 302 MB.
    """
    return _TextCache(config).apply({"params": params}, text)


def _first(tree: Any) -> Any:
    """The first example of every array: enough to initialise a block."""
    return jax.tree.map(lambda leaf: leaf[:1], tree)


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """The transformer's parameters with its layers as a tuple, for unrolled inference; the same numbers."""
    return {**params, "blocks": _layers(params["blocks"])}


def _layers(stacked: Any) -> tuple[Any, ...]:
    count = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(lambda leaf, index=index: leaf[index], stacked) for index in range(count))


def parameter_count(params: Any) -> int:
    """Numbers in a tree of arrays or of shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
