"""StreamDiT-4B (arXiv 2507.03745): 512×512 video at 16 latent frames, 4.12 B parameters in the transformer.

    streamdit train --config=configs/streamdit_4b.py --workdir=runs/streamdit_4b --config.data.source=DIR

DIR holds captioned video, or latents that `streamdit encode` made of it. This is the first stage of the paper's
recipe, task learning (10k steps at 1e-4 on 128 H100); the next two fine-tune its model with
--config.training.flow_matching.start_from=MODEL and --config.training.flow_matching.optimizer.learning_rate=1e-5.
The text encoders have the shapes of UL2, ByT5-Base and a CLIP-sized encoder of 256 tokens (Movie Gen §3.1.3).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.name = "streamdit_4b"
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.source = "data/video"
    config.data.clip_frames = 128
    config.data.height = 512
    config.data.width = 512
    config.data.frame_rate = 16.0
    config.data.autoencoder = ""

    config.tae = ml_collections.ConfigDict()
    config.tae.latent_channels = 8
    config.tae.factors = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    config.tae.widths = (128, 256, 512)
    config.tae.blocks = (2, 2, 4)
    config.tae.kernel_time = 3

    def text(vocab_size, width, num_layers, num_heads, ffn_width):
        sizes = dict(
            vocab_size=vocab_size, width=width, num_layers=num_layers, num_heads=num_heads, ffn_width=ffn_width
        )
        return ml_collections.ConfigDict(dict(**sizes, head_dim=width // num_heads, ffn="gated_gelu", max_tokens=256))

    config.text = (text(32128, 4096, 32, 16, 16384), text(384, 1536, 18, 12, 3968), text(49408, 1280, 32, 20, 5120))

    config.dit = ml_collections.ConfigDict()
    config.dit.latent = (16, 64, 64, 8)
    config.dit.patch = (1, 2, 2)
    config.dit.width = 3072
    config.dit.num_layers = 32
    config.dit.num_heads = 24
    config.dit.ffn_width = 8192
    config.dit.windows = ((8, 16, 16),)
    config.dit.shifted = (False, True)
    config.dit.wrap = (True, True, True)

    config.sampling = ml_collections.ConfigDict()
    config.sampling.scheme = "N8c2s16"
    config.sampling.guidance = 7.5

    config.training = ml_collections.ConfigDict()
    stage = config.training.flow_matching = ml_collections.ConfigDict()
    stage.steps = 10_000
    stage.batch_size = 128
    stage.num_frames = 16
    stage.start_from = ""
    stage.ema_decay = 0.9999
    stage.optimizer = ml_collections.ConfigDict(dict(learning_rate=1e-4, warmup_steps=500, decay="constant", b2=0.95))
    stage.objective = ml_collections.ConfigDict()
    stage.objective.mixture = ml_collections.ConfigDict()
    # Table 3's best mixture, c ∈ {1, 2, 4, 8, 16}; c = 16 is plain text-to-video, which also fills the buffer.
    entries = (("N16c1s1", 1.0), ("N8c2s1", 1.0), ("N4c4s1", 1.0), ("N2c8s1", 1.0), ("N1c16s1", 1.0))
    stage.objective.mixture.entries = entries
    stage.objective.mixture.draw = "batch"
    stage.objective.mixture.shared_offset = 0.0

    config.mesh = ml_collections.ConfigDict(dict(data=1, fsdp=-1, tensor=1))
    return config
