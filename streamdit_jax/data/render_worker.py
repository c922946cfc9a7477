"""A process that renders every n-th roadtrip clip and writes the raw frames to standard output.

`roadtrip_builder` starts one per core as `python -m streamdit_jax.data.render_worker JSON`. A plain child process, not
`multiprocessing`, because that imports the caller's script again in each worker: a training script without a
`if __name__ == "__main__"` guard would start itself over and over.
"""

import json
import sys

import numpy as np

from streamdit_jax.data import roadtrip


def main(request: str):
    """`request`: JSON of split, seed, num_frames, size, start, stop, step. Writes uint8 [F, size, size, 3] per clip."""
    task = json.loads(request)
    for index in range(task["start"], task["stop"], task["step"]):
        factors, clip_seed = roadtrip.clip_factors(index, task["seed"], task["split"])
        clip = roadtrip.render(factors, clip_seed, task["num_frames"], size=task["size"])
        sys.stdout.buffer.write(np.ascontiguousarray(clip, np.uint8))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1])
