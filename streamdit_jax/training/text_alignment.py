"""The text-alignment objective: a caption's encoding must tell what its clip looks like, before a DiT reads it.

    L = Σ over parts of ‖W·pool(text) − part‖² / the batch's variance of the part
    parts of a clip's latents, each channel divided by its deviation: mean over time; deviation over time; motion, how
    its rows correlate with themselves a frame later and moved to either side

StreamDiT's text encoders come trained; one that starts from bytes tells a DiT nothing for thousands of steps, and a DiT
that has learnt to do without text is slow to take it up. Here a linear head W on the mean of the encoders' sequences
predicts the clip's latents without their time axis: what is seen, what moves, and whither and how fast. Each part
weighs the same, however few numbers it has, and so does each channel: docs/roadtrip.md tells how little of direction,
speed and colour an encoder keeps otherwise. The head is dropped afterwards. (chosen; not in the paper)
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from streamdit_jax.compiled import encode_text
from streamdit_jax.config import Config
from streamdit_jax.models.text_cache import Text
from streamdit_jax.training.flow_matching import initial_text
from streamdit_jax.training.objective import Objective


def motion(latents: Float[Array, "b f h w c"]) -> Float[Array, "b n"]:
    """How every row of places correlates with itself one frame later, moved one place to the left, not at all, and one
    place to the right, n = 3·h: over all places, frames and channels, less their means over time. In [−1, 1]; 0 where
    there is nothing to compare.
    """
    moving = latents - latents.mean(1, keepdims=True)  # what stands still is no evidence of motion
    now, later = moving[:, :-1], moving[:, 1:]
    moved = (now[..., 1:, :], later[..., :-1, :]), (now, later), (now[..., :-1, :], later[..., 1:, :])
    return jnp.concatenate([_correlation(*pair) for pair in moved], axis=-1)


def _correlation(x: Float[Array, "b f h w c"], y: Float[Array, "b f h w c"]) -> Float[Array, "b h"]:
    match, energy_x, energy_y = (jnp.sum(product, (1, 3, 4)) for product in (x * y, x * x, y * y))
    return match / (jnp.sqrt(energy_x * energy_y) + 1e-4)


def gist(latents: Float[Array, "b f h w c"]) -> dict[str, Float[Array, "b n"]]:
    """A clip without its time axis: mean and standard deviation over frames, n = h·w·c each, and `motion`."""
    flat = latents.reshape(*latents.shape[:2], -1)
    return {"mean": flat.mean(1), "deviation": flat.std(1), "motion": motion(latents)}


def pool(text: Text) -> Float[Array, "b width"]:
    """The mean of each encoder's sequence over what is not padding, side by side."""
    means = [(x * mask[..., None]).sum(1) / mask.sum(1)[:, None] for x, mask in text]
    return jnp.concatenate(means, axis=-1)


def _head(target: Float[Array, "b n"]) -> nn.Dense:
    return nn.Dense(target.shape[-1], kernel_init=nn.initializers.zeros)


def text_alignment(config: Config, kept: Any = None, keep: float = 0.0) -> Objective:
    """The objective of text encoders on {"latents", "tokens", "text_mask"}; params {"text": {"0": …}, "head": {part:
    …}}. `init` takes text encoders that the batch holds under "initial", {"text": …}, instead of fresh ones.

    kept: the text encoders whose encodings are held on to, {"0": …}; `keep` times the squared distance from these, over
        their variance, joins the loss (learning without forgetting, 1606.09282).

    Metrics: `explained_<part>`, the share of the batch's variance that the prediction explains, at most 1; and
    `forgotten`, that distance.
    """

    def init(key, batch):
        text_key, head_key = jax.random.split(key)
        text = batch["initial"]["text"] if "initial" in batch else initial_text(config.text, text_key, batch)
        pooled = pool(encode_text(config.text, text, batch["tokens"][:1], batch["text_mask"][:1]))
        heads = {
            part: _head(value).init(jax.random.fold_in(head_key, index), pooled)["params"]
            for index, (part, value) in enumerate(gist(batch["latents"][:1]).items())
        }
        return {"text": text, "head": heads}

    def loss(params, constants, batch, key):
        del key
        text = encode_text(config.text, params["text"], batch["tokens"], batch["text_mask"])
        pooled = pool(text)
        latents, unexplained = batch["latents"], {}
        deviations = latents.std((0, 1, 2, 3))  # a few channels, of brightness, are many times as large as all others
        for part, target in gist(latents / (deviations + 1e-3)).items():
            predicted = _head(target).apply({"params": params["head"][part]}, pooled)
            variance = jnp.mean(jnp.square(target - target.mean(0)))
            unexplained[part] = jnp.mean(jnp.square(predicted - target)) / (variance + 1e-3)
        total, metrics = sum(unexplained.values()), {f"explained_{part}": 1 - x for part, x in unexplained.items()}
        if kept is not None:
            before = encode_text(config.text, constants["kept"], batch["tokens"], batch["text_mask"])
            metrics["forgotten"] = sum(map(_distance, text, before))
            total += constants["keep"] * metrics["forgotten"]
        return total, metrics

    constants = () if kept is None else {"kept": kept, "keep": np.float32(keep)}
    return Objective(name="text_alignment", init=init, loss=loss, constants=constants)


def _distance(text: tuple[Array, Array], before: tuple[Array, Array]) -> Array:
    """Mean squared distance of one encoder's sequence from what it was, over the variance of that, without padding."""
    (now, mask), (then, _) = text, before
    count = mask.sum() * now.shape[-1]
    mean = then.sum((0, 1)) / mask.sum()  # padding is 0
    variance = jnp.sum(jnp.square(then - mean) * mask[..., None]) / count
    return jnp.sum(jnp.square(now - then)) / count / variance
