"""Streams that live apart, each in arrays of its own, through one compiled step and one decoding.

They are put together within the compiled function, which exists for 1, 2, 4, … streams: joining, leaving or pausing
moves nothing and compiles nothing, and one stream alone costs what one stream costs. What lacks to a compiled size is
idle: rows that change nothing.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from streamdit_jax import stream as streaming
from streamdit_jax.endless import Forward, Stream
from streamdit_jax.partition import PartitionScheme
from streamdit_jax.pipeline import Pipeline


class Batches:
    """Forwards and decodings of at most `slots` streams of one scheme. Each of the two belongs to one thread."""

    def __init__(self, pipeline: Pipeline, scheme: PartitionScheme, filling: str, slots: int):
        self._pipeline, self._scheme = pipeline, scheme
        self._step = pipeline.step(scheme, masked=streaming.is_masked(filling))
        self._idle: list[streaming.StreamState] = []
        self._idle_row = pipeline.idle_row(scheme)
        self._unguided = jax.device_put(np.ones(1, np.float32))
        self.sizes = [2**power for power in range(slots.bit_length()) if 2**power < slots] + [slots]

    def warm_up(self, streams: list[Stream]) -> None:
        """Compiles every size, with as many streams as there are slots; they are used up."""
        self._idle = [stream.state for stream in streams]
        forward = streams[0].begin()._replace(row=self._idle_row)
        for size in self.sizes:
            self._idle[:size], fronts = self.step(self._idle[:size], [forward] * size)
            jax.block_until_ready(self.decode(fronts, [None] * size))
        # The most that can lack: one more stream than a size needs the next one.
        spare = max(size - smaller - 1 for smaller, size in zip([0, *self.sizes], self.sizes))
        del self._idle[spare:]

    def _lacking(self, count: int) -> int:
        return next(size for size in self.sizes if size >= count) - count

    def step(
        self, states: Sequence[streaming.StreamState], forwards: Sequence[Forward]
    ) -> tuple[list[streaming.StreamState], list[Array]]:
        """One forward, dispatched: the states after it, and the frames at the place of chunk 0. The states before it
        are donated.
        """
        idle = self._lacking(len(states))
        rows, conditions, sources = map(list, zip(*forwards))
        rows += [self._idle_row] * idle
        conditions += [conditions[0]._replace(guidance=self._unguided)] * idle
        sources += [self._pipeline.no_source(self._scheme)] * idle
        if len(rows) == 1:
            state, front = self._step(states[0], rows[0], conditions[0], sources[0])
            return [state], [front]
        together = (*states, *self._idle[:idle])
        after, fronts = self._step(together, tuple(rows), tuple(conditions), tuple(sources))
        self._idle[:idle] = after[len(states) :]
        return list(after[: len(states)]), list(fronts[: len(states)])

    def decode(self, latents: Sequence[Array], states: Sequence[Any]) -> tuple[list[Array], list[Any]]:
        """Frames uint8 [1, n, height, width, 3] of each video and its decoder's state, None at a video's start."""
        idle = self._lacking(len(latents))
        if len(latents) + idle == 1:
            frames, state = self._pipeline.decode(latents[0], states[0])
            return [frames], [state]
        frames, after = self._pipeline.decode((*latents, *latents[:1] * idle), (*states, *[None] * idle))
        return list(frames[: len(latents)]), list(after[: len(latents)])
