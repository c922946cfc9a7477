"""Streams that show exactly what they are asked for, by the renderer: what evaluation must say of them is known."""

from collections.abc import Callable

import numpy as np

from streamdit_jax.data import roadtrip
from streamdit_jax.data.captions import full_caption
from streamdit_jax.evaluation.batched import StreamBatch

ASKED = {full_caption(factors): factors for split in roadtrip.SPLITS for factors in roadtrip.combinations(split)}


def oracle(delay: int = 0, alter: Callable[[np.ndarray, int], np.ndarray] = lambda frames, first: frames) -> type:
    """A StreamBatch that renders its prompts. A changed prompt shows after `delay` chunks; alter(frames, first) is
    applied to uint8 [frames, 64, 64, 3] from frame `first` on.
    """

    class Oracle(StreamBatch):
        def __init__(self, pipeline, prompts, seeds, **sampling):
            super().__init__(pipeline, prompts, seeds, **sampling)
            self._seeds, self._made, self._changed = list(seeds), 0, None

        def change(self, prompts):
            asked = [ASKED[prompt] for prompt in prompts]
            if hasattr(self, "_shown"):
                self._changed = self.emitted + delay, asked
            else:
                self._shown = asked

        def __next__(self):
            if self._changed is not None and self.emitted >= self._changed[0]:
                self._shown = self._changed[1]
            count = 4 * self.scheme.chunk_size
            clips = [
                alter(roadtrip.render(factors, 50 + seed, count, start=self._made), self._made)
                for factors, seed in zip(self._shown, self._seeds)
            ]
            self._made += count
            self.emitted += 1
            self.seconds["forward"] += 0.5
            self.seconds["decode"] += 0.25
            return np.stack(clips)

    return Oracle
