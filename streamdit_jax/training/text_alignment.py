"""The text-alignment objective: a caption's encoding must tell what its clip looks like, before a DiT reads it.

    L = mean ‖W·pool(text) − [mean over time, deviation over time] of the clip's latents‖²

StreamDiT's text encoders come trained; one that starts from bytes tells a DiT nothing for thousands of steps, and a DiT
that has learnt to do without text is slow to take it up. Here a linear head W on the mean of the encoders' sequences
predicts the clip's latents without their time axis: what is seen (the mean) and what moves (the deviation). The head is
dropped afterwards. (chosen; not in the paper)
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from streamdit_jax.compiled import encode_text
from streamdit_jax.config import Config
from streamdit_jax.models.text_cache import Text
from streamdit_jax.training.flow_matching import initial_text
from streamdit_jax.training.objective import Objective


def gist(latents: Float[Array, "b f h w c"]) -> Float[Array, "b n"]:
    """A clip without its time axis: mean and standard deviation over frames, n = 2·h·w·c."""
    return jnp.concatenate([latents.mean(1).reshape(len(latents), -1), latents.std(1).reshape(len(latents), -1)], -1)


def pool(text: Text) -> Float[Array, "b width"]:
    """The mean of each encoder's sequence over what is not padding, side by side."""
    means = [(x * mask[..., None]).sum(1) / mask.sum(1)[:, None] for x, mask in text]
    return jnp.concatenate(means, axis=-1)


def text_alignment(config: Config) -> Objective:
    """The objective of text encoders on {"latents", "tokens", "text_mask"}; params {"text": {"0": …}, "head": …}.

    Metric: `explained`, the share of the batch's variance that the prediction explains; at most 1.
    """

    def head(latents):
        return nn.Dense(gist(latents).shape[-1])

    def init(key, batch):
        text_key, head_key = jax.random.split(key)
        text = initial_text(config.text, text_key, batch)
        pooled = pool(encode_text(config.text, text, batch["tokens"][:1], batch["text_mask"][:1]))
        return {"text": text, "head": head(batch["latents"][:1]).init(head_key, pooled)["params"]}

    def loss(params, constants, batch, key):
        del constants, key
        text = encode_text(config.text, params["text"], batch["tokens"], batch["text_mask"])
        target = gist(batch["latents"])
        predicted = head(batch["latents"]).apply({"params": params["head"]}, pool(text))
        error = jnp.mean(jnp.square(predicted - target))
        return error, {"explained": 1 - error / jnp.mean(jnp.square(target - target.mean(0)))}

    return Objective(name="text_alignment", init=init, loss=loss)
