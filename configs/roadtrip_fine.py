"""Roadtrip in small patches, second of three: video, from configs/roadtrip_fine_image.py's model on.

    streamdit train --config=configs/roadtrip_fine.py --workdir=runs/roadtrip_fine

Expect what docs/roadtrip.md records of its first 1,500 steps.
"""

import ml_collections

from configs import roadtrip, roadtrip_fine_image


def get_config() -> ml_collections.ConfigDict:
    config = roadtrip.get_config()
    config.name = "roadtrip_fine"
    config.data.source = "runs/roadtrip_fine_image/latents"
    config.data.autoencoder = "runs/roadtrip_fine_image"
    config.dit = roadtrip_fine_image.get_config().dit
    config.dit.latent = (16, 8, 8, 32)
    # Two rows of all frames, where what scrolls can be followed; then four whole frames, which hold a picture together.
    config.dit.windows = ((16, 2, 8), (4, 8, 8))

    stage = config.training.flow_matching
    stage.start_from = "runs/roadtrip_fine_image"
    stage.steps = 4500
    stage.optimizer.name = "muon"
    stage.optimizer.learning_rate = 2e-3
    stage.optimizer.final_scale = 0.02
    return config
