"""Roadtrip, second of three: video, on a mixture of partition schemes, from configs/roadtrip_image.py's model on.

    streamdit train --config=configs/roadtrip.py --workdir=runs/roadtrip
    streamdit stream "a red car drives past green hills" --model=runs/roadtrip

Expect what docs/roadtrip.md records. configs/roadtrip_distill.py makes of it the model that ships.
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
    config.sampling.filling = "doubling"
    config.sampling.refill = "2:0.875"

    config.training = ml_collections.ConfigDict()
    stage = config.training.flow_matching = ml_collections.ConfigDict()
    stage.start_from = "runs/roadtrip_image"
    stage.text_from = ""
    stage.train_text = False
    stage.steps = 6000
    stage.batch_size = 8
    stage.accumulate = 1  # 2 is faster on two CPU cores
    stage.num_frames = 16
    stage.ema_decay = 0.998
    stage.checkpoint_every = 250
    stage.sample_every = 0
    stage.optimizer = ml_collections.ConfigDict(
        dict(name="muon", learning_rate=2e-3, warmup_steps=50, decay="cosine", final_scale=0.02, weight_decay=0.01)
    )
    # Some steps go on with images, which show eight times as many prompts; others with short clips whose first half is
    # given, clean, which is how a buffer doubles (sampling.filling).
    stage.buckets = ml_collections.ConfigDict(
        dict(
            images=dict(latent=(1, 8, 8), batch_size=64, share=0.1, source=""),
            twos=dict(latent=(2, 8, 8), batch_size=64, share=0.12, source=""),
            fours=dict(latent=(4, 8, 8), batch_size=32, share=0.25, source=""),
            eights=dict(latent=(8, 8, 8), batch_size=16, share=0.2, source=""),
        )
    )
    mixture = ml_collections.ConfigDict()
    # Text tells most where there is little else to see: p2 draws more of the levels near noise. K2N7c2s1 teaches the
    # model to go on from given frames.
    mixture.entries = (
        ("N8c2s1", 4.0),
        ("N1c16s1p2", 2.0),
        ("N1c16s1", 0.5),
        ("K8N1c8s1p2", 1.5),
        ("N16c1s1", 0.3),
        ("N4c4s1", 0.3),
        ("N2c8s1", 0.3),
        ("K2N7c2s1", 0.3),
        # of eights, fours and twos
        ("K4N1c4s1p2", 2.0),
        ("K6N1c2s1p2", 0.7),
        ("K2N1c2s1p2", 2.0),
        ("K1N1c3s1p2", 1.0),
        ("K1N1c1s1p2", 1.0),
    )
    mixture.uniform_share = 0.0
    mixture.shared_offset = 0.5
    stage.objective = ml_collections.ConfigDict()
    stage.objective.mixture = mixture
    stage.objective.caption_dropout = 0.1
    # A model that has only seen whole clips trusts the frames it has more than a prompt that contradicts them.
    stage.objective.switch_share = 0.25
    return config
