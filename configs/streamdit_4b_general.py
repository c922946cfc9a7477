"""StreamDiT-4B, third of four: task generalisation (arXiv 2507.03745, §5.1). 10k steps at 1e-5 on 2.6 M videos.

    streamdit train --config=configs/streamdit_4b_general.py --workdir=runs/streamdit_4b_general \
        --config.data.source=DIR

From configs/streamdit_4b_task.py's model on, with its mixture, on the videos of the base. It has not been run.
"""

import ml_collections

from configs import streamdit_4b_task


def get_config() -> ml_collections.ConfigDict:
    config = streamdit_4b_task.get_config()
    config.data.source = "data/latents"
    stage = config.training.flow_matching
    stage.start_from = "runs/streamdit_4b_task"
    stage.optimizer.learning_rate = 1e-5
    return config
