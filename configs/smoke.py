"""Data → autoencoder → text → DiT → student → stream in under three minutes on two CPU cores; the end-to-end test.

    streamdit train --config=configs/smoke.py --workdir=/tmp/smoke && streamdit stream "a red car" --model=/tmp/smoke
    --seconds=2

Expect an autoencoder of about 25 dB on its training clips and coloured noise that moves: it shows that everything
fits together, not what the model can do.
"""

import ml_collections

from configs import roadtrip_distill, roadtrip_image


def get_config() -> ml_collections.ConfigDict:
    config = roadtrip_image.get_config()
    config.name = "smoke"
    config.data.num_clips = 24
    config.data.clip_frames = 40
    config.data.captions_per_clip = 2

    config.tae.latent_channels = 16
    config.tae.widths = (16, 24, 32)
    config.tae.blocks = (1, 1, 1)

    text = config.text[0].copy_and_resolve_references()
    text.width, text.num_layers, text.num_heads, text.head_dim, text.ffn_width = 32, 1, 2, 16, 64
    config.text = (text,)

    config.dit.latent = (8, 8, 8, 16)
    config.dit.patch = (1, 2, 2)
    config.dit.width = 64
    config.dit.num_layers = 2
    config.dit.num_heads = 2
    config.dit.ffn_width = 128
    config.dit.windows = ((4, 4, 4),)
    config.dit.shifted = (False, True)
    config.dit.wrap = (False, True, True)
    config.dit.position = "learned"
    config.sampling.scheme = "N4c2s1"

    config.training.flow_matching.train_text = True
    config.training.flow_matching.optimizer.update(dict(name="adamw", learning_rate=2e-3))
    # A third of the steps are on images, single latent frames of the same clips.
    config.training.flow_matching.buckets = ml_collections.ConfigDict(
        dict(images=dict(latent=(1, 8, 8), batch_size=16, share=0.3, source=""))
    )
    config.training.distillation = roadtrip_distill.get_config().training.distillation
    config.training.distillation.teacher = ""
    config.training.distillation.scheme = "N4c2s1"
    config.training.distillation.teacher_steps = 2
    for stage in config.training.values():
        stage.steps = 30
        stage.batch_size = 4
        stage.log_every = 10
        stage.checkpoint_every = 20
        stage.num_frames = 8
        stage.optimizer.warmup_steps = 5
    config.training.flow_matching.sample_every = 30
    config.training.flow_matching.objective.mixture.entries = (("N4c2s1", 1.0), ("N1c8s1p3", 1.0))
    return config
