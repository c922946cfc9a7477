"""The flow-matching objective: one velocity model for every partition scheme of a mixture (StreamDiT §3.1, §3.2; eq.
1–3, 7–9).

A step draws, for each example or for the batch, a scheme and a level for each chunk, noises the clip to these levels,
and scores the predicted velocity on all frames but references. Text encoders are trained along; a dropped caption is
the empty prompt.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamdit_jax import flops, flow
from streamdit_jax.compiled import encode_text
from streamdit_jax.config import Config
from streamdit_jax.models.dit import Axes, DiT
from streamdit_jax.models.tae import TAE
from streamdit_jax.models.text import TextConfig, TextEncoder, tokenize
from streamdit_jax.partition import draw_levels
from streamdit_jax.sharding import constrain
from streamdit_jax.stages import FlowMatchingObjective
from streamdit_jax.training.autoencoder import to_unit_range
from streamdit_jax.training.objective import Batch, Objective


def initial_text(configs: tuple[TextConfig, ...], key: jax.Array, batch: Batch) -> dict[str, Any]:
    """Fresh parameters of the text encoders, {"0": …, "1": …, …}."""
    tokens, mask = (jnp.asarray(batch[name][:1]) for name in ("tokens", "text_mask"))
    return {
        str(index): TextEncoder(config).init(jax.random.fold_in(key, index), tokens, mask)["params"]
        for index, config in enumerate(configs)
    }


def frozen(params: Any, dtype: Any) -> Any:
    """Parameters that no step changes, in the type of the arithmetic: half the memory and half the traffic, where that
    is bfloat16. Arrays, or `jax.ShapeDtypeStruct`s.
    """

    def store(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, dtype)
        return np.asarray(leaf).astype(dtype, copy=False)

    return jax.tree.map(store, params)


def max_tokens(configs: tuple[TextConfig, ...]) -> int:
    """The tokens that every encoder of a model takes."""
    return min(config.max_tokens for config in configs)


# Deviation of the frames of a lengthened image model, about that of rows and columns once they are trained. Without it,
# frames that all have one position did not come apart in 1,400 steps of training on video (docs/roadtrip.md).
FRAME_DEVIATION = 0.08
SHORTEST_PERIOD = 2.5  # frames


def lengthen(params: Any, expected: Any) -> Any:
    """A DiT's params for a longer buffer: every learned position of a frame is repeated to fill the new length. From a
    single frame, a model of images, sinusoids over the frames are added, so that the model can tell them apart from
    its first step on; the first frame stays as it is.

    params, expected: trees of the same model, their leaves named "frame" [layers, F, width] with F_old and F_new
    frames; frame i of the new buffer starts as frame ⌊i·F_old / F_new⌋. All else is returned as it is.
    """

    def longer(path, leaf, shape):
        if getattr(path[-1], "key", None) != "frame" or leaf.shape == shape.shape:
            return leaf
        old, new = leaf.shape[-2], shape.shape[-2]
        repeated = leaf[..., np.arange(new) * old // new, :]
        return repeated + _waves(new, leaf.shape[-1]).astype(leaf.dtype) if old == 1 else repeated

    return jax.tree_util.tree_map_with_path(longer, params, expected)


def _waves(frames: int, width: int) -> np.ndarray:
    """[frames, width]: sines and cosines of periods from a few frames to three buffers, less their values at frame 0,
    with a root mean square of `FRAME_DEVIATION`.
    """
    periods = np.geomspace(SHORTEST_PERIOD, max(3 * frames, SHORTEST_PERIOD), (width + 1) // 2)
    angles = 2 * np.pi * np.arange(frames)[:, None] / periods
    waves = np.concatenate([np.sin(angles), np.cos(angles) - 1], axis=-1)[:, :width]
    return FRAME_DEVIATION * waves / np.sqrt(np.mean(waves**2))


def splice(key: jax.Array, latents: jax.Array, share: jax.Array | float) -> jax.Array:
    """Clips [b, F, …] as a change of prompt leaves them: of a share of the examples, the frames before a place that is
    drawn uniformly from 1 … F − 1 are those of the example before it in the batch, of which there must be two at least.
    The caption tells only the rest. share: one for all, or each example's, [b, 1].
    """
    size, frames = latents.shape[:2]
    if frames == 1:
        return latents
    share_key, place_key = jax.random.split(key)
    place = jax.random.randint(place_key, (size, 1), 1, frames)
    spliced = jax.random.uniform(share_key, (size, 1)) < share
    before = spliced & (jnp.arange(frames) < place)
    return jnp.where(before[..., None, None, None], jnp.roll(latents, 1, axis=0), latents)


def at_several_levels(levels: jax.Array, scored: jax.Array) -> jax.Array:
    """Of each example, [b, 1], whether its noisy frames have several levels, as while streaming: what is at one level,
    after references or without, is made at once, and no prompt changes in it. levels, scored: [b, F].
    """
    lowest = jnp.min(jnp.where(scored, levels, jnp.inf), axis=1, keepdims=True)
    return jnp.max(jnp.where(scored, levels, -jnp.inf), axis=1, keepdims=True) > lowest


def flow_matching(
    config: Config,
    objective: FlowMatchingObjective,
    tae_params=None,
    text_params=None,
    buckets: tuple[Axes, ...] = (),
) -> Objective:
    """The objective of text encoders and DiT on {"latents" or "video", "tokens", "text_mask"}; params {"text": {"0":
    …}, "dit": …}, or {"dit": …} where text_params are given: text encoders that do not learn.

    `init` takes what the batch holds under "initial", {"text": …, "dit": …}, either or both, instead of fresh ones.
    tae_params: the frozen autoencoder, needed where batches hold pixels. buckets: (frames, height, width) of latents
        that batches may have beside those of `dit.latent`; each takes the schemes of the mixture that tile its frames.
    Metrics: `velocity_loss` by quarter of the flow time, and `scored_share` of the frames.
    """
    dit, frozen_text = DiT(config.dit, buckets), text_params is not None
    empty_tokens, empty_mask = tokenize("", max_tokens(config.text))

    def latents_of(constants, batch):
        if "latents" in batch:
            return batch["latents"]
        video = to_unit_range(batch["video"])
        return TAE(config.tae).apply({"params": constants["tae"]}, video, method=TAE.encode)[0]

    def init(key, batch):
        given = batch.get("initial", {})
        text_key, dit_key = jax.random.split(key)
        learning = given["text"] if "text" in given else initial_text(config.text, text_key, batch)
        if "dit" in given:
            dit_params = given["dit"]
        else:
            latents = jnp.zeros((1, *config.dit.latent))
            text = encode_text(config.text, learning, batch["tokens"][:1], batch["text_mask"][:1])
            dit_params = dit.init(dit_key, latents, jnp.zeros(latents.shape[:2]), text)["params"]
        return {"dit": dit_params} if frozen_text else {"text": learning, "dit": dit_params}

    def loss(params, constants, batch, key):
        level_key, noise_key, drop_key = jax.random.split(key, 3)
        latents = jax.lax.stop_gradient(latents_of(constants, batch))
        size = len(latents)
        per_example = objective.mixture.draw == "example"
        mixture = constants["mixture"][str(latents.shape[1])]
        drawn = draw_levels(level_key, mixture, size, per_example=per_example)
        drawn = jax.tree.map(lambda x: constrain(x, "batch", None), drawn)
        share = constants["switch_share"] * at_several_levels(drawn.levels, drawn.scored)
        latents = splice(jax.random.fold_in(key, 1), latents, share)
        noise = constrain(jax.random.normal(noise_key, latents.shape), "batch", *[None] * 4)
        dropped = jax.random.uniform(drop_key, (size, 1)) < constants["caption_dropout"]
        tokens = jnp.where(dropped, empty_tokens, batch["tokens"])
        mask = jnp.where(dropped, empty_mask, batch["text_mask"])

        noised = flow.interpolate(latents, noise, drawn.levels)
        target = flow.velocity_target(latents, noise)
        present = drawn.present if objective.mixture.ramp else None
        text = encode_text(config.text, (constants if frozen_text else params)["text"], tokens, mask)
        text = tuple((constrain(x, "batch", None, None), constrain(mask, "batch", None)) for x, mask in text)
        predicted = dit.apply({"params": params["dit"]}, noised, drawn.levels, text, present)
        value = flow.loss(predicted, target, drawn.scored)
        quarters = {}
        for quarter in range(4):
            inside = drawn.scored & (jnp.clip(jnp.floor(drawn.levels * 4), 0, 3) == quarter)
            quarters[f"velocity_loss_{quarter + 1}of4"] = flow.loss(predicted, target, inside)
        return value, {**quarters, "scored_share": jnp.mean(drawn.scored.astype(jnp.float32))}

    frames = sorted({config.dit.latent[0], *(bucket[0] for bucket in buckets)})
    constants = {
        "mixture": {str(length): objective.mixture.arrays(length) for length in frames},
        "caption_dropout": np.float32(objective.caption_dropout),
        "switch_share": np.float32(objective.switch_share),
    }
    if tae_params is not None:
        constants["tae"] = tae_params
    if frozen_text:
        constants["text"] = frozen(text_params, config.dit.compute_dtype)

    def count(batch):
        latents = batch["latents"].shape if "latents" in batch else (len(batch["video"]), *config.dit.latent)
        return 3 * latents[0] * flops.of_model(config, latents[1:4], text_is_cached=False)["total"]

    return Objective(name="flow_matching", init=init, loss=loss, constants=constants, flops=count)
