"""Roadtrip, third of four: configs/roadtrip.py's model learns to follow a change of prompt.

    streamdit train --config=configs/roadtrip_switch.py --workdir=runs/roadtrip_switch

A model that has only seen whole clips trusts the frames it has more than a prompt that contradicts them. Here the first
frames of half of the examples are another clip's, and the caption tells only the rest. Expect what docs/roadtrip.md
records.
"""

import ml_collections

from configs import roadtrip


def get_config() -> ml_collections.ConfigDict:
    config = roadtrip.get_config()
    config.name = "roadtrip_switch"

    stage = config.training.flow_matching
    stage.start_from = "runs/roadtrip"
    stage.steps = 300
    stage.ema_decay = 0.98
    stage.checkpoint_every = 100
    stage.optimizer.learning_rate = 1e-3
    stage.optimizer.warmup_steps = 20
    stage.objective.switch_share = 0.5
    return config
