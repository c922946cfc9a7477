"""The temporal autoencoder (TAE): a causal 3-D convolutional autoencoder with explicit streaming state.

    level i:   x ← Dense_i(fold(x, factors_i))    fold = space-to-depth: a strided convolution with kernel = stride
               x ← x + conv_causal(silu(rms_norm(x)))      × blocks_i
    encoder:   levels 0 … n−1, then a head to (mean, log-variance); decoder: the mirror image
    skip:      mean ← mean + W_e·fold(video);  reconstruction ← reconstruction + unfold(W_d·latent)

Movie Gen (arXiv 2410.13720, §3.1.1) inflates an image autoencoder with temporal convolutions padded symmetrically;
StreamDiT (arXiv 2507.03745, §11) decodes chunks apart and flickers at the joints. Here every temporal convolution looks
back only, and its last input frames are the state that travels from call to call: coding chunk by chunk *is* coding the
clip at once. Norms act per position, folds act within a latent frame, so nothing else reaches across frames. A causal
convolution is one NHWC convolution over the channels of `kernel_time` neighbouring frames: on CPUs 1.3–2 times faster
than a 3-D one.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

State = tuple[
    Float[Array, "b taps h w c"], ...
]  # one entry per causal convolution: its last kernel_time − 1 input frames

LOG_VARIANCE_RANGE = (-20.0, 4.0)
INITIAL_LOG_VARIANCE = (
    -6.0
)  # a posterior of σ = 0.05 at the start: σ = 1 would drown the whitened skip's unit-variance latents
RESIDUAL_SCALE = (
    0.05  # output convolutions start small, so that training starts at the linear skip (or at the folds) and refines it
)


@dataclass(frozen=True)
class TAEConfig:
    """Shape of a TAE. Levels run from pixels to latents; raises ValueError naming the field that is wrong.

    factors: per level, the (time, height, width) folded on entering it; their product is the compression.
    widths, blocks: channels and residual blocks at each level; the encoder walks them forward, the decoder backward.
    kernel_time: causal temporal taps of every residual convolution; 1 means that latent frames are coded independently.
    linear_skip: a trainable linear path (whole fold → latent → whole fold) beside the trunk: initialise_linear_skip.
    """

    latent_channels: int = 8
    factors: tuple[tuple[int, int, int], ...] = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    widths: tuple[int, ...] = (64, 128, 256)
    blocks: tuple[int, ...] = (1, 1, 2)
    kernel_time: int = 2
    linear_skip: bool = False

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(tuple(level) for level in self.factors))
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not self.factors or any(
            len(level) != 3 or any(not _is_count(f, 1) for f in level) for level in self.factors
        ):
            raise ValueError(
                f"factors: got {self.factors}; each level needs three whole numbers ≥ 1 (time, height, width)"
            )
        for name, least in (("widths", 1), ("blocks", 0)):
            values = getattr(self, name)
            if len(values) != len(self.factors):
                raise ValueError(
                    f"{name}: {len(values)} entries for {len(self.factors)} levels of factors; give one per level"
                )
            if any(not _is_count(v, least) for v in values):
                raise ValueError(f"{name}: got {values}; every entry must be a whole number ≥ {least}")
        for name in ("latent_channels", "kernel_time"):
            if not _is_count(getattr(self, name), 1):
                raise ValueError(f"{name}: got {getattr(self, name)}; it must be a whole number ≥ 1")

    @property
    def compression(self) -> tuple[int, int, int]:
        """Pixels per latent along (time, height, width)."""
        return tuple(math.prod(level[axis] for level in self.factors) for axis in range(3))

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """[f, h, w, C] of a video's latents; frames round up. Raises ValueError for sizes that do not fold."""
        time, rows, columns = self.compression
        for name, size, multiple in (("height", height, rows), ("width", width, columns)):
            if size < 1 or size % multiple:
                raise ValueError(f"{name}: {size} pixels do not fold; it must be a multiple of {multiple}")
        if num_frames < 1:
            raise ValueError(f"frames: got {num_frames}; a video has at least one frame")
        return -(-num_frames // time), height // rows, width // columns, self.latent_channels


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def fold(x: Float[Array, "b f h w c"], factors: tuple[int, int, int]) -> Float[Array, "b f2 h2 w2 d"]:
    """Space-to-depth over time, height and width; channels come out in the order (time, height, width, channel)."""
    t, h, w = factors
    return rearrange(x, "b (f t) (y h) (x w) c -> b f y x (t h w c)", t=t, h=h, w=w)


def unfold(x: Float[Array, "b f2 h2 w2 d"], factors: tuple[int, int, int]) -> Float[Array, "b f h w c"]:
    """Depth-to-space, the inverse of fold."""
    t, h, w = factors
    return rearrange(x, "b f y x (t h w c) -> b (f t) (y h) (x w) c", t=t, h=h, w=w)


def initial_encoder_state(config: TAEConfig, batch: int, height: int, width: int, dtype=jnp.float32) -> State:
    """The state at the start of a video of height × width pixels: `state=None`, spelt out for a jitted step."""
    states = []
    for (_, rows, columns), channels, blocks in zip(config.factors, config.widths, config.blocks):
        height, width = height // rows, width // columns
        states += [jnp.zeros((batch, config.kernel_time - 1, height, width, channels), dtype)] * blocks
    return tuple(states)


def initial_decoder_state(config: TAEConfig, batch: int, height: int, width: int, dtype=jnp.float32) -> State:
    """As initial_encoder_state (height and width in pixels), for the decoder, which walks the same levels backward."""
    return initial_encoder_state(config, batch, height, width, dtype)[::-1]


class CausalConv(nn.Module):
    """kernel_time × 3 × 3 convolution that sees the present and the past: frames before the first are zero."""

    features: int
    kernel_time: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"], state: Float[Array, "b taps h w c"] | None):
        frames, taps = x.shape[1], self.kernel_time - 1
        if state is None:
            state = jnp.zeros((x.shape[0], taps, *x.shape[2:]), x.dtype)
        past = jnp.concatenate([state.astype(x.dtype), x], axis=1)
        neighbours = jnp.concatenate([past[:, i : i + frames] for i in range(self.kernel_time)], axis=-1)
        init = nn.initializers.variance_scaling(RESIDUAL_SCALE**2, "fan_in", "truncated_normal")
        conv = nn.Conv(self.features, (3, 3), kernel_init=init, dtype=self.dtype, name="conv")
        out = conv(rearrange(neighbours, "b f h w c -> (b f) h w c"))
        return rearrange(out, "(b f) h w c -> b f h w c", f=frames), past[:, frames:]


class ResidualBlock(nn.Module):
    """x + conv_causal(silu(rms_norm(x))); the norm is per position, over channels."""

    kernel_time: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w c"], state: Float[Array, "b taps h w c"] | None):
        h = nn.silu(nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x))
        h, state = CausalConv(x.shape[-1], self.kernel_time, self.dtype, name="causal")(h, state)
        return x + h, state


class Encoder(nn.Module):
    """video [b, F, H, W, 3] → features [b, f, h, w, 2C] (mean and log-variance of the trunk), state."""

    config: TAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b F H W 3"], state: State | None):
        config, taken = self.config, 0
        states = []
        for level, (factors, width, blocks) in enumerate(zip(config.factors, config.widths, config.blocks)):
            x = nn.Dense(width, dtype=self.dtype, name=f"in_{level}")(fold(x, factors))
            for block in range(blocks):
                module = ResidualBlock(config.kernel_time, self.dtype, name=f"block_{level}_{block}")
                x, new = module(x, None if state is None else state[taken])
                states.append(new)
                taken += 1
        x = nn.silu(nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x))
        return nn.Dense(2 * config.latent_channels, kernel_init=_head_init(config), dtype=self.dtype, name="head")(
            x
        ), tuple(states)


class Decoder(nn.Module):
    """raw latents [b, f, h, w, C] → video [b, F, H, W, 3] (the trunk's part), state."""

    config: TAEConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b f h w C"], state: State | None):
        config, taken = self.config, 0
        states = []
        x = nn.Dense(config.widths[-1], dtype=self.dtype, name="in")(x)
        for level in reversed(range(len(config.factors))):
            for block in range(config.blocks[level]):
                module = ResidualBlock(config.kernel_time, self.dtype, name=f"block_{level}_{block}")
                x, new = module(x, None if state is None else state[taken])
                states.append(new)
                taken += 1
            factors, size = config.factors[level], math.prod(config.factors[level])
            if level > 0:
                x = nn.Dense(size * config.widths[level - 1], dtype=self.dtype, name=f"out_{level}")(x)
            else:
                x = nn.silu(nn.RMSNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(x))
                # In float32, as the skip: bfloat16 has but 128 values from one half to one.
                x = nn.Dense(size * 3, kernel_init=_head_init(config), dtype=jnp.float32, name="head")(x)
            x = unfold(x, factors)
        return x, tuple(states)


def _head_init(config: TAEConfig):
    """Beside a linear skip the trunk starts near zero; alone it starts at unit scale."""
    scale = RESIDUAL_SCALE**2 if config.linear_skip else 1.0
    return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal")


class TAE(nn.Module):
    """The autoencoder; call its methods with `tae.apply({"params": params}, …, method=TAE.decode)`.

    Parameters hold `latent_mean` and `latent_std` [C] beside the weights: data statistics, set after training by
    training.autoencoder.latent_statistics, never trained. encode and decode speak normalised latents; posterior and
    reconstruct speak raw ones. A state belongs to one method and one video; None starts a video. dtype is that of the
    computation.
    """

    config: TAEConfig
    dtype: Any = jnp.float32

    def setup(self):
        config = self.config
        self.encoder = Encoder(config, self.dtype)
        self.decoder = Decoder(config, self.dtype)
        if config.linear_skip:
            self.encoder_skip = nn.Dense(config.latent_channels, dtype=self.dtype)
            self.decoder_skip = nn.Dense(3 * math.prod(config.compression), dtype=jnp.float32)
        self.latent_mean = self.param("latent_mean", nn.initializers.zeros, (config.latent_channels,))
        self.latent_std = self.param("latent_std", nn.initializers.ones, (config.latent_channels,))

    def __call__(self, video: Float[Array, "b F H W 3"], key: jax.Array):
        """Training forward: reconstruction [b, F, H, W, 3] of one sample, mean and log_variance [b, f, h, w, C]."""
        mean, log_variance, _ = self.posterior(video)
        latents = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)
        reconstruction, _ = self.reconstruct(latents)
        return reconstruction[:, : video.shape[1]], mean, log_variance

    def encode(self, video: Float[Array, "b F H W 3"], state: State | None = None):
        """video in [−1, 1] → (normalised posterior mean float32 [b, f, h, w, C], state).

        F that is no multiple of the temporal compression is completed by repeating the last frame, so an image
        [b, 1, H, W, 3] is coded as a still; in a chunked video only the last chunk may need that. ValueError when H or
        W do not fold.
        """
        mean, _, state = self.posterior(video, state)
        return (mean - jax.lax.stop_gradient(self.latent_mean)) / jax.lax.stop_gradient(self.latent_std), state

    def posterior(self, video: Float[Array, "b F H W 3"], state: State | None = None):
        """video → (mean, log_variance, state): the raw posterior, float32 [b, f, h, w, C]."""
        self.config.latent_shape(*video.shape[1:4])
        video = _complete(video, self.config.compression[0]).astype(self.dtype)
        features, state = self.encoder(video, state)
        mean, log_variance = jnp.split(features.astype(jnp.float32), 2, axis=-1)
        if self.config.linear_skip:
            mean = mean + self.encoder_skip(fold(video, self.config.compression)).astype(jnp.float32)
        return mean, jnp.clip(log_variance + INITIAL_LOG_VARIANCE, *LOG_VARIANCE_RANGE), state

    def decode(self, latents: Float[Array, "b f h w C"], state: State | None = None):
        """normalised latents → (video float32 [b, F, H, W, 3] around [−1, 1], not clipped; state)."""
        return self.reconstruct(
            latents * jax.lax.stop_gradient(self.latent_std) + jax.lax.stop_gradient(self.latent_mean), state
        )

    def reconstruct(self, latents: Float[Array, "b f h w C"], state: State | None = None):
        """As decode, from raw latents: what training and the statistics use."""
        video, state = self.decoder(latents.astype(self.dtype), state)
        if self.config.linear_skip:
            video = video + unfold(self.decoder_skip(latents), self.config.compression)
        return video.astype(jnp.float32), state


def _complete(video: Float[Array, "b F H W 3"], multiple: int) -> Float[Array, "b F2 H W 3"]:
    missing = -video.shape[1] % multiple
    return jnp.concatenate([video, *[video[:, -1:]] * missing], axis=1) if missing else video


def initialise_linear_skip(params: dict, video: Float[Array, "b F H W 3"], config: TAEConfig) -> dict:
    """Params whose linear skip is the whitened PCA of the video's patches, in closed form (jit-able).

    With patches p (whole folds of video in [−1, 1]), their mean m and leading eigenpairs (λ, V) of their covariance:
    encoder (p − m)·V/√λ, decoder z·√λ·Vᵀ + m. Latents of these patches have mean 0 and variance 1. ValueError without
    a linear skip.
    """
    if not config.linear_skip:
        raise ValueError("linear_skip: is False, there is nothing to initialise; set it True")
    video = _complete(video.astype(jnp.float32), config.compression[0])
    patches = rearrange(fold(video, config.compression), "b f h w d -> (b f h w) d")
    mean = patches.mean(axis=0)
    centred = patches - mean
    values, vectors = jnp.linalg.eigh(centred.T @ centred / patches.shape[0])  # ascending
    count = min(config.latent_channels, patches.shape[1])
    scale = jnp.sqrt(jnp.maximum(values[::-1][:count], 1e-6))  # constant directions must not blow up
    basis = vectors[:, ::-1][:, :count]
    encode, decode = basis / scale, (basis * scale).T
    spare = config.latent_channels - count
    encode, decode = jnp.pad(encode, ((0, 0), (0, spare))), jnp.pad(decode, ((0, spare), (0, 0)))
    skips = {
        "encoder_skip": {"kernel": encode, "bias": -mean @ encode},
        "decoder_skip": {"kernel": decode, "bias": mean},
    }
    return {**params, **skips}
