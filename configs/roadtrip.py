"""Roadtrip, second of four: video, on a mixture of partition schemes, from configs/roadtrip_image.py's model on.

    streamdit train --config=configs/roadtrip.py --workdir=runs/roadtrip
    streamdit stream "a red car drives past green hills" --model=runs/roadtrip

Expect what docs/roadtrip.md records. configs/roadtrip_switch.py and configs/roadtrip_distill.py make of it the model
that ships.
"""

import ml_collections

from configs import roadtrip_image


def get_config() -> ml_collections.ConfigDict:
    config = roadtrip_image.get_config()
    config.name = "roadtrip"
    config.data.source = "runs/roadtrip_image/latents"
    config.data.autoencoder = "runs/roadtrip_image"
    config.dit.latent = (16, 8, 8, 32)
    # Two rows of all frames, where what scrolls can be followed; then four whole frames, which hold a picture together.
    config.dit.windows = ((16, 2, 8), (4, 8, 8))
    config.sampling.scheme = "N8c2s16"

    config.training = ml_collections.ConfigDict()
    stage = config.training.flow_matching = ml_collections.ConfigDict()
    stage.start_from = "runs/roadtrip_image"
    stage.train_text = False
    stage.steps = 3400
    stage.batch_size = 8
    stage.num_frames = 16
    stage.ema_decay = 0.998
    stage.checkpoint_every = 250
    stage.sample_every = 0
    stage.optimizer = ml_collections.ConfigDict(
        dict(name="muon", learning_rate=2e-3, warmup_steps=50, decay="cosine", final_scale=0.02, weight_decay=0.01)
    )
    mixture = ml_collections.ConfigDict()
    # Text tells most where there is little else to see: p2 draws more of the levels near noise. K2N7c2s1 teaches the
    # model to go on from given frames.
    mixture.entries = (
        ("N1c16s1p2", 1.5),
        ("N1c16s1", 1.0),
        ("N8c2s1", 4.0),
        ("N16c1s1", 0.5),
        ("N4c4s1", 0.5),
        ("N2c8s1", 0.5),
        ("K2N7c2s1", 0.5),
    )
    mixture.uniform_share = 0.0
    mixture.shared_offset = 0.5
    stage.objective = ml_collections.ConfigDict()
    stage.objective.mixture = mixture
    stage.objective.caption_dropout = 0.1
    return config
