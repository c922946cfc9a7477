"""StreamDiT-4B (arXiv 2507.03745), first of four: base text-to-video. 512×512, 16 latent frames, 4.12 B parameters.

    streamdit train --config=configs/streamdit_4b.py --workdir=runs/streamdit_4b --config.data.source=DIR

DIR holds latents that `streamdit encode` made of captioned video. The recipe is Movie Gen's (2410.13720, §3.1, §3.2):
flow matching at one level per clip, t ~ logit-normal(0, 1); images and videos in one run, in buckets of about as many
tokens; captions dropped for guidance, and beginning with the frame rate; frozen text encoders of the shapes of UL2,
ByT5-Base and a CLIP-sized encoder of 256 tokens, from the model that `text_from` names. The numbers of steps and of
examples are chosen here. configs/streamdit_4b_task.py goes on from it. It has been compiled, and not been run.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict()
    config.name = "streamdit_4b"
    config.seed = 0

    config.data = ml_collections.ConfigDict()
    config.data.source = "data/latents"
    config.data.clip_frames = 128
    config.data.height = 512
    config.data.width = 512
    config.data.frame_rate = 16.0
    config.data.frame_rate_prompt = True
    config.data.autoencoder = ""

    config.tae = ml_collections.ConfigDict()
    config.tae.latent_channels = 8
    config.tae.factors = ((1, 2, 2), (2, 2, 2), (2, 2, 2))
    config.tae.widths = (128, 256, 512)
    config.tae.blocks = (2, 2, 4)
    config.tae.kernel_time = 3

    def text(vocab_size, width, num_layers, num_heads, ffn_width, ffn):
        sizes = dict(
            vocab_size=vocab_size, width=width, num_layers=num_layers, num_heads=num_heads, ffn_width=ffn_width
        )
        return ml_collections.ConfigDict(dict(**sizes, head_dim=width // num_heads, ffn=ffn, max_tokens=256))

    config.text = (
        text(32128, 4096, 32, 16, 16384, "gated_silu"),
        text(384, 1536, 18, 12, 3968, "gated_gelu"),
        text(49408, 1280, 32, 20, 5120, "gelu"),
    )

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
    config.dit.remat = "full"

    config.sampling = ml_collections.ConfigDict()
    config.sampling.scheme = "N1c16s50"  # one level for all frames is what this model has learnt
    config.sampling.guidance = 7.5

    config.training = ml_collections.ConfigDict()
    stage = config.training.flow_matching = ml_collections.ConfigDict()
    stage.start_from = ""
    stage.text_from = "runs/text_encoders"
    stage.train_text = False
    stage.steps = 100_000
    stage.batch_size = 512
    stage.accumulate = 1
    stage.num_frames = 16
    stage.ema_decay = 0.9999
    stage.log_every = 50
    stage.checkpoint_every = 500
    stage.optimizer = ml_collections.ConfigDict(dict(learning_rate=1e-4, warmup_steps=1000, decay="constant", b2=0.95))

    def bucket(frames, height, width, batch_size, share, source):
        return dict(latent=(frames, height, width), batch_size=batch_size, share=share, source=source)

    # Images are single frames of the same clips until a `source` of images is named.
    stage.buckets = ml_collections.ConfigDict(
        dict(
            images=bucket(1, 64, 64, 8192, 0.25, ""),
            wide=bucket(16, 32, 64, 1024, 0.25, "data/latents_wide"),
            tall=bucket(16, 64, 32, 1024, 0.1, "data/latents_tall"),
        )
    )
    stage.objective = ml_collections.ConfigDict()
    stage.objective.caption_dropout = 0.1
    stage.objective.mixture = ml_collections.ConfigDict()
    stage.objective.mixture.entries = (("N1c16s1", 1.0),)
    stage.objective.mixture.uniform_share = 0.0
    stage.objective.mixture.uniform_levels = "logit_normal"
    stage.objective.mixture.draw = "example"
    stage.objective.mixture.shared_offset = 0.0

    # On fewer than 64 devices: --config.mesh.data=1 --config.mesh.fsdp=-1. Why not 256 on a pod: docs/scale.md.
    config.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=64, window=1, tensor=1, slices=1))
    return config
