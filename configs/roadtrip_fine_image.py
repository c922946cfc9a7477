"""Roadtrip in small patches, first of three: configs/roadtrip_image.py with a narrow transformer of 8×8 tokens a frame,
and Muon.

    streamdit train --config=configs/roadtrip_fine_image.py --workdir=runs/roadtrip_fine_image

A better model a step and a minute than the one that ships, which it has not yet been trained long enough to replace:
docs/roadtrip.md compares them.
"""

import ml_collections

from configs import roadtrip_image


def get_config() -> ml_collections.ConfigDict:
    config = roadtrip_image.get_config()
    config.name = "roadtrip_fine_image"
    config.data.num_clips = 2048

    config.dit.patch = (1, 1, 1)
    config.dit.width = 128
    config.dit.num_heads = 2
    config.dit.ffn_width = 512
    config.dit.windows = ((1, 2, 8), (1, 8, 8))
    config.dit.shifted = (False,)
    config.dit.position = "both"

    stage = config.training.flow_matching
    stage.steps = 2000
    stage.checkpoint_every = 250
    stage.optimizer.name = "muon"
    stage.optimizer.learning_rate = 3e-3
    stage.optimizer.warmup_steps = 50
    return config
