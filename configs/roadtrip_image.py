"""Roadtrip, first of three: autoencoder, text encoder, and a transformer that knows images.

    streamdit train --config=configs/roadtrip_image.py --workdir=runs/roadtrip_image

A latent frame is a sixteenth of a buffer, so that for the price of one video the transformer sees sixteen prompts: what
a prompt looks like is learnt here, how it moves in configs/roadtrip.py, which starts from this run's model. Expect what
docs/roadtrip.md records.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.name = "roadtrip_image"
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.source = "roadtrip"
    config.data.num_clips = 4096
    config.data.clip_frames = 80
    config.data.captions_per_clip = 8
    config.data.height = 64
    config.data.width = 64
    config.data.frame_rate = 16.0
    config.data.autoencoder = ""

    config.tae = ml_collections.ConfigDict()
    config.tae.latent_channels = 32
    config.tae.factors = ((4, 2, 2), (1, 2, 2), (1, 2, 2))
    config.tae.widths = (64, 128, 192)
    config.tae.blocks = (1, 1, 2)
    config.tae.kernel_time = 2
    config.tae.linear_skip = True

    text = ml_collections.ConfigDict()
    text.vocab_size = 384
    text.width = 128
    text.num_layers = 2
    text.num_heads = 4
    text.head_dim = 32
    text.ffn_width = 256
    text.ffn = "gated_gelu"
    text.bias_per_layer = True
    text.local_start = 6.0
    text.max_tokens = 128
    config.text = (text,)

    config.dit = ml_collections.ConfigDict()
    config.dit.latent = (1, 8, 8, 32)
    config.dit.patch = (1, 1, 1)
    config.dit.width = 128
    config.dit.num_layers = 6
    config.dit.num_heads = 2
    config.dit.ffn_width = 512
    config.dit.windows = ((1, 2, 8), (1, 8, 8))
    config.dit.shifted = (False,)
    config.dit.position = "both"
    config.dit.qk_norm = "head"
    config.dit.pooled_text = True
    config.dit.remat = "none"

    config.sampling = ml_collections.ConfigDict()
    config.sampling.scheme = "N1c1s16"
    config.sampling.guidance = 2.0
    config.sampling.filling = "uniform"

    config.training = ml_collections.ConfigDict()
    stage = config.training.autoencoder = ml_collections.ConfigDict()
    stage.steps = 2000
    stage.batch_size = 8
    stage.num_frames = 8
    stage.ema_decay = 0.995
    stage.checkpoint_every = 500
    stage.optimizer = ml_collections.ConfigDict(
        dict(learning_rate=1e-3, warmup_steps=50, decay="cosine", final_scale=0.02, b1=0.9, b2=0.99, weight_decay=0.0)
    )
    stage.importance_power = 0.4
    stage.objective = ml_collections.ConfigDict(dict(l1=1.0, mse=2.0, gradient=0.5, kl=1e-4, image_share=0.25))

    stage = config.training.text_alignment = ml_collections.ConfigDict()
    stage.start_from = ""
    stage.keep = 0.0
    stage.steps = 1600
    stage.batch_size = 32
    stage.num_frames = 16
    stage.ema_decay = 0.99
    stage.checkpoint_every = 400
    stage.optimizer = ml_collections.ConfigDict(
        dict(learning_rate=2e-3, warmup_steps=50, decay="cosine", final_scale=0.05, weight_decay=0.01)
    )

    stage = config.training.flow_matching = ml_collections.ConfigDict()
    stage.start_from = ""
    stage.train_text = False
    stage.steps = 2000
    stage.batch_size = 64
    stage.num_frames = 1
    stage.ema_decay = 0.998
    stage.checkpoint_every = 250
    stage.sample_every = 0
    stage.optimizer = ml_collections.ConfigDict(
        dict(name="muon", learning_rate=3e-3, warmup_steps=50, decay="cosine", final_scale=0.15, weight_decay=0.01)
    )
    mixture = ml_collections.ConfigDict()
    # Text tells most where there is little else to see: p2 draws more of the levels near noise.
    mixture.entries = (("N1c1s1p2", 1.0), ("N1c1s1", 1.0))
    mixture.uniform_share = 0.0
    mixture.shared_offset = 0.0
    stage.objective = ml_collections.ConfigDict()
    stage.objective.mixture = mixture
    stage.objective.caption_dropout = 0.1
    return config
