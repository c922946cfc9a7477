"""Roadtrip, last of three: the student that ships. Eight unguided steps for its teacher's 16 to 128 guided ones.

    streamdit train --config=configs/roadtrip_distill.py --workdir=runs/roadtrip_distill
    streamdit stream "a red car drives past green hills" --model=runs/roadtrip_distill

The teacher is configs/roadtrip.py's model; it takes `teacher_steps` guided steps for each of the student's.
Expect what docs/roadtrip.md records.
"""

import ml_collections

from configs import roadtrip


def get_config() -> ml_collections.ConfigDict:
    config = roadtrip.get_config()
    config.sampling.scheme = "N8c2s1"
    config.sampling.guidance = 1.0

    config.training = ml_collections.ConfigDict()
    stage = config.training.distillation = ml_collections.ConfigDict()
    stage.teacher = "runs/roadtrip"
    stage.scheme = "N8c2s1"
    stage.teacher_steps = 2
    stage.guidance = 4.0
    stage.method = "segment"
    stage.uniform_share = 0.1
    stage.doubling_share = 0.45
    stage.rollout_share = 0.25
    stage.rollout_chunks = 4
    stage.switch_share = 0.5
    stage.steps = 320
    stage.batch_size = 8
    stage.num_frames = 16
    stage.ema_decay = 0.99
    stage.checkpoint_every = 50
    stage.optimizer = ml_collections.ConfigDict(
        dict(learning_rate=3e-4, warmup_steps=10, decay="cosine", final_scale=0.1, weight_decay=0.0)
    )
    return config
