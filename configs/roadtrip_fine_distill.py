"""Roadtrip in small patches, third of three: a student of configs/roadtrip_fine.py's model.

    streamdit train --config=configs/roadtrip_fine_distill.py --workdir=runs/roadtrip_fine_distill

Expect what docs/roadtrip.md records.
"""

import ml_collections

from configs import roadtrip_distill, roadtrip_fine


def get_config() -> ml_collections.ConfigDict:
    config = roadtrip_fine.get_config()
    of_student = roadtrip_distill.get_config()
    config.sampling = of_student.sampling
    config.training = of_student.training

    stage = config.training.distillation
    stage.teacher = "runs/roadtrip_fine"
    stage.guidance = 1.5
    stage.steps = 200
    return config
