"""configs/smoke.py made as small as it goes, for runs of several processes on one machine."""

import ml_collections

from configs import smoke


def get_config() -> ml_collections.ConfigDict:
    config = smoke.get_config()
    config.name = "tiny"
    config.data.num_clips = 8
    config.data.clip_frames = 32
    config.tae.latent_channels = 4
    config.tae.widths = (8, 8, 8)
    config.dit.latent = (8, 8, 8, 4)
    config.dit.width = 32
    config.dit.num_layers = 1
    config.dit.shifted = (False,)
    config.dit.ffn_width = 64
    config.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1})
    config.training.distillation = None
    for stage in config.training.values():
        if stage is not None:
            stage.steps = 4
            stage.log_every = 1
            stage.checkpoint_every = 2
            stage.optimizer.warmup_steps = 1
    config.training.flow_matching.sample_every = 0
    return config
