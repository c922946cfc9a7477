"""StreamDiT-4B, second of four: task learning (arXiv 2507.03745, §5.1). 10k steps at 1e-4 on 3k videos of high quality.

    streamdit train --config=configs/streamdit_4b_task.py --workdir=runs/streamdit_4b_task --config.data.source=DIR

From configs/streamdit_4b.py's model on, the mixture of partition schemes of the paper's best row in Table 3: c ∈ {1, 2,
4, 8, 16}; c = 16 is plain text-to-video, which also fills the buffer. Another model or mixture is a flag each:

    --config.training.flow_matching.start_from=MODEL
    --config.training.flow_matching.objective.mixture.entries="(('N8c2s1', 4.0), ('N1c16s1', 1.0))"

The paper trains each of its three stages on 128 H100; batch sizes are chosen here. It has been compiled, and not been
run.
"""

import ml_collections

from configs import streamdit_4b


def get_config() -> ml_collections.ConfigDict:
    config = streamdit_4b.get_config()
    config.data.source = "data/latents_high_quality"
    config.sampling.scheme = "N8c2s16"

    stage = config.training.flow_matching
    stage.start_from = "runs/streamdit_4b"
    stage.text_from = ""
    stage.steps = 10_000
    stage.batch_size = 256
    stage.optimizer.learning_rate = 1e-4
    stage.optimizer.warmup_steps = 500
    stage.buckets = ml_collections.ConfigDict()
    entries = (("N16c1s1", 1.0), ("N8c2s1", 1.0), ("N4c4s1", 1.0), ("N2c8s1", 1.0), ("N1c16s1", 1.0))
    stage.objective.mixture.entries = entries
    stage.objective.mixture.draw = "batch"
    return config
