"""Many streams in one forward: evaluation waits for frames, not for the next stream's turn."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from streamdit_jax import stream as streaming
from streamdit_jax.errors import ConfigError
from streamdit_jax.partition import PartitionScheme, Refill
from streamdit_jax.pipeline import Pipeline
from streamdit_jax.timetable import Timetable


class StreamBatch(Iterator[np.ndarray]):
    """Independent streams in step with each other. Each `next` gives what left their buffers: uint8 [batch, frames,
    height, width, 3]. Stream i is, to rounding, `pipeline.stream(prompts[i], seeds[i])`.

    `seconds` sums the time spent in "forward" and "decode"; `forwards` counts micro steps, `emitted` the chunks that
    left.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        scheme: PartitionScheme | str | None = None,
        guidance: float | None = None,
        filling: str | None = None,
        refill: Refill | str | None = None,
    ):
        """scheme, guidance, filling, refill: the model's own unless given. Raises as `Pipeline.stream`."""
        sampling = pipeline.config.sampling
        self._pipeline, self.scheme = pipeline, pipeline.scheme(scheme)
        self.guidance = sampling.guidance if guidance is None else float(guidance)
        self.filling = filling or sampling.filling
        refill = pipeline.refill(self.scheme, self.filling) if refill is None else refill
        try:
            self._table = Timetable(self.scheme, self.filling, pipeline.latent_frames, refill=refill)
        except ValueError as mistake:
            raise ConfigError(str(mistake)) from None
        self.refill = self._table.refill
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"prompts: {len(prompts)} for {len(seeds)} seeds; a batch needs one of each per stream")
        keys = jax.vmap(jax.random.key)(jnp.asarray([seed % 2**32 for seed in seeds], jnp.uint32))
        self._state = streaming.initial_state(keys, self.scheme, pipeline.config.dit.latent[1:], self.filling)
        self._weight = np.full(len(prompts), self.guidance, np.float32)
        self._null = self._encode([""] * len(prompts))
        self._decoder, self._step = None, 0
        self.change(prompts)
        self.seconds, self.forwards, self.emitted = {"forward": 0.0, "decode": 0.0}, 0, 0

    def _encode(self, prompts: Sequence[str]) -> Any:
        encoded = [self._pipeline.encode_prompt(prompt) for prompt in prompts]
        return self._pipeline.cache_text(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *encoded))

    def change(self, prompts: Sequence[str]) -> None:
        """New prompts, one per stream, from the next micro step on."""
        self._text = self._encode(prompts)
        self._table.follow(self._step, 0)

    def forward(self) -> jax.Array | None:
        """One micro step; the clean latents [batch, frames, h, w, C] if frames left the buffers."""
        if self._table.renews(self._step):
            self._state = self._pipeline.renew(self.scheme, self._state, self._table.renewal_level)
        row = self._table.row(self._step)
        condition = streaming.Condition(self._text, self._null, self._weight)
        step = self._pipeline.step(self.scheme, masked=streaming.is_masked(self.filling))
        self._state, front = step(self._state, row, condition)
        self._step += 1
        self.forwards += 1
        if self._table.shows_references(self._step - 1):
            return self._state.buffer[:, : self.scheme.num_references]
        return front if row.advance else None

    def wait(self) -> None:
        """Until the last micro step is done."""
        jax.block_until_ready(self._state.buffer)

    def latents(self) -> jax.Array:
        """Micro steps until frames leave the buffers, not waited for; their clean latents."""
        front = None
        while front is None:
            front = self.forward()
        self.emitted += 1
        return front

    def decode(self, latents: jax.Array) -> jax.Array:
        """The frames of what left next, on the device and not waited for: uint8 [batch, frames, height, width, 3]."""
        frames, self._decoder = self._pipeline.decode(latents, self._decoder)
        return frames

    def __next__(self) -> np.ndarray:
        began = time.perf_counter()
        latents = jax.block_until_ready(self.latents())
        denoised = time.perf_counter()
        frames = np.asarray(self.decode(latents))
        self.seconds["forward"] += denoised - began
        self.seconds["decode"] += time.perf_counter() - denoised
        return frames


def groups(items: Sequence[Any], size: int) -> Iterator[tuple[int, list[Any], int]]:
    """(place of the first, items, how many of them count) in groups of `size`: the last group is filled up with
    repetitions, so that one batch size, and one compilation, serves all.
    """
    size = min(size, len(items))
    for first in range(0, len(items), size):
        group = list(items[first : first + size])
        yield first, (group * size)[:size], len(group)


def videos(
    pipeline: Pipeline, prompts: Sequence[str], frames: int, seed: int, batch: int, **sampling: Any
) -> Iterator[tuple[int, np.ndarray, StreamBatch]]:
    """The first `frames` frames of a stream for each prompt, with seeds `seed`, `seed` + 1, …: yields, per batch, the
    place of its first prompt, uint8 [streams, frames, height, width, 3], and the batch itself (for what it measured).
    """
    for first, group, count in groups(list(prompts), batch):
        streams = StreamBatch(pipeline, group, range(seed + first, seed + first + len(group)), **sampling)
        made = []
        while sum(chunk.shape[1] for chunk in made) < frames:
            made.append(next(streams))
        yield first, np.concatenate(made, axis=1)[:count, :frames], streams
