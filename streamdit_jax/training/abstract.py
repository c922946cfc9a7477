"""A stage in shapes alone: its batches and its objective, for a compilation before there is any data, or any device.

The loop compiles a step for each batch that is described here, and `streamdit plan` compiles the same ones.
"""

import jax
import jax.numpy as jnp

from streamdit_jax.config import Config
from streamdit_jax.errors import ConfigError
from streamdit_jax.parameters import initialise
from streamdit_jax.stages import MAIN
from streamdit_jax.training.autoencoder import autoencoder
from streamdit_jax.training.distillation import distillation
from streamdit_jax.training.flow_matching import flow_matching, max_tokens
from streamdit_jax.training.objective import Batch, Objective
from streamdit_jax.training.text_alignment import text_alignment


def abstract_batches(config: Config, name: str) -> dict[str, Batch]:
    """The global batches of the stage training.`name` as `jax.ShapeDtypeStruct`s, by bucket, the main one first."""
    stage = getattr(config.training, name)
    if name == "autoencoder":
        shape = (stage.batch_size, stage.num_frames, config.data.height, config.data.width, 3)
        return {MAIN: {"video": jax.ShapeDtypeStruct(shape, jnp.uint8)}}
    longest = max_tokens(config.text)

    def batch(size, latent):
        return {
            "latents": jax.ShapeDtypeStruct((size, *latent, config.dit.latent[3]), jnp.float32),
            "tokens": jax.ShapeDtypeStruct((size, longest), jnp.int32),
            "text_mask": jax.ShapeDtypeStruct((size, longest), jnp.bool_),
        }

    others = {other: batch(bucket.batch_size, bucket.latent) for other, bucket in stage.buckets_by_name().items()}
    return {MAIN: batch(stage.batch_size, (stage.num_frames, *config.dit.latent[1:3])), **others}


def abstract_objective(config: Config, name: str) -> tuple[Objective, dict[str, Batch]]:
    """The objective of the stage training.`name` and its batches (see `abstract_batches`), without a file read or a
    device touched: frozen text encoders and teachers are `jax.ShapeDtypeStruct`s, a mixture's small tables arrays.

    ConfigError where the configuration does not have the stage.
    """
    stage = getattr(config.training, name, None)
    if stage is None:
        raise ConfigError(f"training.{name}: the configuration has no such stage")
    batches = abstract_batches(config, name)
    if name == "autoencoder":
        return autoencoder(config.tae, stage.objective, config.dit.compute_dtype), batches
    model = jax.eval_shape(lambda: initialise(config, jax.random.key(0)))
    if name == "text_alignment":
        return text_alignment(config, model["text"] if stage.keep else None, stage.keep), batches
    if name == "distillation":
        return distillation(config, stage, model), batches
    frozen = None if stage.train_text else model["text"]
    return flow_matching(config, stage.objective, text_params=frozen, buckets=stage.shapes()), batches
