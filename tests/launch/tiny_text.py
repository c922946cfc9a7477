"""Text alignment alone, on latents: a run of two processes that steps within seconds."""

import ml_collections

from tests.launch import tiny


def get_config() -> ml_collections.ConfigDict:
    config = tiny.get_config()
    config.name = "tiny_text"
    stage = config.training.text_alignment
    stage.steps = 60
    stage.checkpoint_every = 1000
    config.training = ml_collections.ConfigDict({"text_alignment": stage})
    return config
