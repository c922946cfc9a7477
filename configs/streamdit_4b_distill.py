"""StreamDiT-4B distilled (arXiv 2507.03745, §4.2): 128 guided steps become 8, at a chunk of 2, N = 8.

    streamdit train --config=configs/streamdit_4b_distill.py --workdir=runs/distilled --config.data.source=DIR

The teacher is configs/streamdit_4b_quality.py's model, sampled at 16 micro steps a chunk with guidance; the student
takes one, without. The paper trains it for 10k steps on 64 H100. DIR holds latents that `streamdit encode` made. It has
been compiled, and not been run.
"""

import ml_collections

from configs import streamdit_4b_quality


def get_config() -> ml_collections.ConfigDict:
    config = streamdit_4b_quality.get_config()
    config.sampling.scheme = "N8c2s1"
    config.sampling.guidance = 1.0

    config.training = ml_collections.ConfigDict()
    stage = config.training.distillation = ml_collections.ConfigDict()
    stage.teacher = "runs/streamdit_4b_quality"
    stage.scheme = "N8c2s1"
    stage.teacher_steps = 16
    stage.guidance = 7.5
    stage.method = "segment"
    stage.uniform_share = 0.1
    stage.rollout_share = 0.25
    stage.rollout_chunks = 8
    stage.steps = 10_000
    stage.batch_size = 64
    stage.num_frames = 16
    stage.ema_decay = 0.999
    stage.checkpoint_every = 500
    stage.optimizer = ml_collections.ConfigDict(
        dict(learning_rate=1e-5, warmup_steps=500, decay="constant", final_scale=1.0, weight_decay=0.01)
    )
    return config
