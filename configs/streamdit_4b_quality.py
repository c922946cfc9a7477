"""StreamDiT-4B, last of four: quality fine-tuning (arXiv 2507.03745, §5.1). 10k steps at 1e-5 on good videos.

    streamdit train --config=configs/streamdit_4b_quality.py --workdir=runs/streamdit_4b_quality \
        --config.data.source=DIR

From configs/streamdit_4b_general.py's model on. Runs over different sets of videos make models that `streamdit average`
puts together, as Movie Gen does. configs/streamdit_4b_distill.py makes of the result what streams in real time. It has
not been run.
"""

import ml_collections

from configs import streamdit_4b_general


def get_config() -> ml_collections.ConfigDict:
    config = streamdit_4b_general.get_config()
    config.data.source = "data/latents_high_quality"
    stage = config.training.flow_matching
    stage.start_from = "runs/streamdit_4b_general"
    return config
