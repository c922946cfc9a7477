"""The autoencoder objective: reconstruct video through a small, well-behaved latent.

    L = l1·|x̂ − x| + mse·(x̂ − x)² + gradient·|∇x̂ − ∇x| + kl·KL(q ‖ N(0, I)) + outlier·L_outlier

Movie Gen (arXiv 2410.13720, §3.1.1) trains with L1, perceptual, adversarial and KL terms on images and videos, and
adds the outlier penalty against latents that stand out of their frame. The gradient term stands for the perceptual one
here: finite differences along time, height and width ask for edges and motion, and need no pretrained weights.
"""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from streamdit_jax.models.tae import TAE, TAEConfig, initialise_linear_skip
from streamdit_jax.stages import AutoencoderObjective
from streamdit_jax.training.objective import Objective


def autoencoder(config: TAEConfig, objective: AutoencoderObjective, dtype=jnp.float32) -> Objective:
    """The objective of a TAE on batches {"video": uint8 [b, F, H, W, 3]}; params are {"tae": …}.

    init puts the whitened PCA of its batch into a linear skip. dtype is that of the computation; parameters and losses
    are float32.

    Images: a share `image_share` of the examples of every batch counts as still images. Its clip is replaced by its
    first frame repeated, so shapes stay: the first latent is exactly the code of a one-frame video (the causal TAE
    cannot see that it goes on), and the later ones teach that a still stays still.
    """
    tae = TAE(config, dtype)

    def init(key, batch):
        video = to_unit_range(batch["video"])
        params = tae.init(key, video, key)["params"]
        return {"tae": initialise_linear_skip(params, video, config) if config.linear_skip else params}

    def loss(params, constants, batch, key):
        del constants
        still_key, sample_key = jax.random.split(key)
        video = stills(to_unit_range(batch["video"]), objective.image_share, still_key)
        reconstruction, mean, log_variance = tae.apply({"params": params["tae"]}, video, sample_key)
        error = reconstruction - video
        parts = {
            "l1": jnp.abs(error).mean(),
            "mse": jnp.square(error).mean(),
            "gradient": gradient_loss(reconstruction, video),
            "kl": 0.5 * (jnp.square(mean) + jnp.exp(log_variance) - 1.0 - log_variance).mean(),
            "outlier": outlier_penalty(mean, objective.outlier_radius),
        }
        total = sum(getattr(objective, name) * value for name, value in parts.items())
        return total, {**parts, "psnr": psnr(jnp.clip(reconstruction, -1.0, 1.0), video)}

    return Objective(name="autoencoder", init=init, loss=loss, constants=())


def to_unit_range(video) -> Float[Array, "*shape"]:
    """uint8 pixels → float32 in [−1, 1]."""
    return jnp.asarray(video).astype(jnp.float32) / 127.5 - 1.0


def stills(video: Float[Array, "b F H W 3"], share: float, key: jax.Array) -> Float[Array, "b F H W 3"]:
    """Freezes examples at their first frame: ⌊share·b⌋ or ⌈share·b⌉ of b, evenly spread, share·b on average."""
    ticks = jnp.floor(jnp.arange(video.shape[0] + 1) * share + jax.random.uniform(key))
    frozen = (ticks[1:] > ticks[:-1])[:, None, None, None, None]
    return jnp.where(frozen, video[:, :1], video)


def gradient_loss(a: Float[Array, "b F H W 3"], b: Float[Array, "b F H W 3"]) -> Float[Array, ""]:
    """Mean |∂a − ∂b| of finite differences, averaged over time, height and width (a lone frame has no ∂t)."""
    error = a - b
    terms = [jnp.abs(jnp.diff(error, axis=axis)).mean() for axis in (1, 2, 3) if error.shape[axis] > 1]
    return sum(terms) / max(len(terms), 1)


def outlier_penalty(latents: Float[Array, "b f h w C"], radius: float) -> Float[Array, ""]:
    """Movie Gen's outlier penalty loss, mean over latent frames of 1/(hw) Σ_ij max(‖X_ij − mean(X)‖ − r·‖std(X)‖, 0).

    Norms run over channels; mean and std over the positions of one frame.
    """
    centred = latents - latents.mean(axis=(2, 3), keepdims=True)
    squares = jnp.square(centred).sum(axis=-1)
    spread = jnp.sqrt(
        squares.mean(axis=(2, 3), keepdims=True) + 1e-12
    )  # ‖std‖² = Σ_c var_c; 1e-12: √ has no slope at 0
    return jnp.maximum(jnp.sqrt(squares + 1e-12) - radius * spread, 0.0).mean()


def psnr(a, b) -> Float[Array, ""]:
    """Peak signal-to-noise ratio in dB over all elements of two videos; floats in [−1, 1], or both uint8."""
    peak = 255.0 if jnp.asarray(a).dtype == jnp.uint8 else 2.0
    error = jnp.square(jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32)).mean()
    return 10.0 * jnp.log10(peak**2 / jnp.maximum(error, 1e-12))


def latent_statistics(params: dict, videos: Iterable, config: TAEConfig) -> dict:
    """TAE params whose latent_mean and latent_std [C] are those of the raw posterior means over all videos.

    videos: batches uint8 [b, F, H, W, 3], each coded from its start; sums are float64. Afterwards encode() yields mean
    0, std 1 per channel. ValueError when there are no videos. A channel that never varies keeps std 1.
    """
    means = jax.jit(lambda p, video: TAE(config).apply({"params": p}, to_unit_range(video), method=TAE.posterior)[0])
    count, total, squares = 0, np.zeros(config.latent_channels), np.zeros(config.latent_channels)
    for video in videos:
        latents = np.asarray(means(params, video), np.float64).reshape(-1, config.latent_channels)
        count, total, squares = (
            count + len(latents),
            total + latents.sum(axis=0),
            squares + np.square(latents).sum(axis=0),
        )
    if count == 0:
        raise ValueError("videos: none given; the statistics need at least one batch")
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - np.square(mean), 0.0))
    std = np.where(std > 1e-6, std, 1.0)
    return {**params, "latent_mean": jnp.asarray(mean, jnp.float32), "latent_std": jnp.asarray(std, jnp.float32)}


def weigh_channels(params: dict, videos: Iterable, config: TAEConfig, power: float, seed: int = 0) -> dict:
    """TAE params whose latent channels have deviation g_c = (I_c / mean I)^power, over their root mean square.

    I_c is the mean squared change of the picture when noise of half a deviation is added to channel c of these
    videos' latents (batches uint8 [b, F, H, W, 3]; the statistics must be set). Whitened latents give a channel that
    nobody sees as much of a diffusion model's loss as the one that holds the brightness: of roadtrip's 32, one carries
    61 % of I and twenty carry 4 % together. With power 0.5 latents are as far apart as their pictures; 0 changes
    nothing. ValueError when there are no videos.
    """

    @jax.jit
    def changes(params, video, key):
        latents = TAE(config).apply({"params": params}, to_unit_range(video), method=TAE.encode)[0]
        decode = functools.partial(TAE(config).apply, {"params": params}, method=TAE.decode)
        picture = decode(latents)[0]

        def of_channel(channel):
            noise = 0.5 * jax.random.normal(jax.random.fold_in(key, channel), latents.shape[:-1])
            return jnp.mean(jnp.square(decode(latents.at[..., channel].add(noise))[0] - picture))

        return jax.lax.map(of_channel, jnp.arange(config.latent_channels))

    importance, count = np.zeros(config.latent_channels), 0
    for video in videos:
        importance += np.asarray(changes(params, video, jax.random.fold_in(jax.random.key(seed), count)), np.float64)
        count += 1
    if count == 0:
        raise ValueError("videos: none given; the importance of channels needs at least one batch")
    scale = np.maximum(importance / importance.mean(), 1e-6) ** power
    scale /= np.sqrt(np.mean(np.square(scale)))
    return {**params, "latent_std": jnp.asarray(params["latent_std"] / scale, jnp.float32)}
