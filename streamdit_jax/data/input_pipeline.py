"""Batches for training: seeded shuffle, random crops and captions, the same rows whatever the number of processes
(Grain).

Row r of step n is the global example g = n · batch_size + r. Everything about it follows from (seed, g): the clip
is g's place in an endless shuffle (every epoch another order), crop and caption come from a generator seeded with
(seed, g). So the state of the input is one integer, the step; any number of processes may continue from it.

Of several buckets, batches of different shapes, step n has the one that the n-th number of a generator seeded with the
seed picks; in its own data a bucket is as far as it had steps. So one integer still says all.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np

from streamdit_jax.data.records import Records
from streamdit_jax.errors import DataError

Tokenizer = Callable[[str], tuple[np.ndarray, np.ndarray]]


def global_index(local: int, rows: int, batch_size: int, process_index: int) -> int:
    """The global example that is a process's `local`-th; each holds `rows` consecutive rows of every batch."""
    return (local // rows) * batch_size + process_index * rows + local % rows


@dataclasses.dataclass(frozen=True)
class _Load:
    """Turns a process's running index into one row: a crop and, with a tokenizer, one caption's tokens."""

    records: Records
    order: grain.MapDataset
    seed: int
    num_frames: int
    rows: int
    batch_size: int
    process_index: int
    tokenize: Tokenizer | None

    def __call__(self, local: int) -> dict[str, np.ndarray]:
        index = global_index(local, self.rows, self.batch_size, self.process_index)
        clip_index = self.order[index]
        clip = self.records[clip_index]
        rng = np.random.default_rng([self.seed, index])
        start = int(rng.integers(self.records.shape[0] - self.num_frames + 1))
        frames = clip[self.records.key][start : start + self.num_frames]
        row = {self.records.key: frames if frames.dtype == np.uint8 else frames.astype(np.float32)}
        # Drawn even where unused, so that crops do not depend on the tokenizer.
        caption = clip["captions"][int(rng.integers(len(clip["captions"])))]
        if self.tokenize is not None:
            try:
                row["tokens"], row["text_mask"] = self.tokenize(caption)
            except ValueError as error:
                raise DataError(
                    f"{self.records.directory}: caption {caption!r:.60} of clip {clip_index}: {error}"
                ) from error
        return row


class Batches(Iterator[dict[str, np.ndarray]]):
    """Endless iterator of batches. `next_step`: the step whose batch comes next; saving this integer saves the
    input's state.
    """

    def __init__(self, iterator: Iterator[dict[str, np.ndarray]], next_step: int):
        self._iterator, self.next_step = iterator, next_step

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self.next_step += 1
        return batch

    def close(self):
        """Stops the reading threads."""
        close: Any = getattr(self._iterator, "close", None)
        if close is not None:
            close()


def make_batches(
    records: Records,
    *,
    batch_size: int,
    num_frames: int,
    seed: int,
    tokenize: Tokenizer | None = None,
    process_index: int = 0,
    process_count: int = 1,
    first_step: int = 0,
    prefetch: int = 4,
) -> Batches:
    """Endless batches from `records`, starting with the batch of step `first_step`.

    Each is a dict of numpy arrays holding this process's rows, b = batch_size / process_count of them:
    "video" uint8 [b, num_frames, H, W, 3] or "latents" float32 [b, num_frames, h, w, C]; with `tokenize` (str →
    (tokens int32 [S], mask bool [S])) also "tokens" [b, S] and "text_mask" [b, S].
    `batch_size` is global; processes hold consecutive rows. `num_frames` consecutive frames are cut out of each
    clip at random.
    `prefetch`: batches read ahead, each by a thread of its own; 0 reads in the caller's thread.

    DataError: the clips are shorter than `num_frames`, a clip is damaged, or a caption does not fit the tokenizer.
    ValueError: the batch does not divide by the processes.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size: {batch_size} does not divide by {process_count} processes; choose a multiple of them"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index: {process_index}; it must lie in 0 … {process_count - 1}")
    if seed < 0 or first_step < 0:
        raise ValueError(f"seed and first_step: {seed} and {first_step}; neither may be negative")
    if not 1 <= num_frames <= records.shape[0]:
        raise DataError(
            f"{records.directory}: num_frames is {num_frames} and its clips have {records.shape[0]} {records.key} "
            "frames; it must be between 1 and their length"
        )
    rows = batch_size // process_count
    order = grain.MapDataset.range(len(records)).seed(seed).shuffle().repeat(None)
    load = _Load(records, order, seed, num_frames, rows, batch_size, process_index, tokenize)
    batches = grain.MapDataset.range(first_step * rows, _END // rows * rows).map(load).batch(rows, drop_remainder=True)
    iterator = iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)))
    return Batches(iterator, first_step)


class BucketedBatches(Iterator[dict[str, np.ndarray]]):
    """Endless iterator of batches, each from one of several buckets; the same bucket on every process.

    open_bucket: (name, first) → the bucket's own batches, from its `first`-th on. shares: of the steps, by name; they
    make 1. `next_step`: the step whose batch comes next; saving this integer saves the state of all buckets.
    """

    def __init__(
        self,
        open_bucket: Callable[[str, int], Batches],
        shares: Mapping[str, float],
        *,
        seed: int,
        first_step: int = 0,
    ):
        self._names, self._limits = list(shares), np.cumsum(list(shares.values()))[:-1]
        self._random = np.random.Generator(np.random.Philox(seed))
        before = np.bincount(self._pick(self._random.random(first_step)), minlength=len(self._names))
        self._buckets = [open_bucket(name, int(first)) for name, first in zip(self._names, before)]
        self.next_step = first_step

    def _pick(self, drawn: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._limits, drawn, side="right")

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._buckets[int(self._pick(self._random.random()))])
        self.next_step += 1
        return batch

    def close(self):
        """Stops the reading threads of all buckets."""
        for bucket in self._buckets:
            bucket.close()


_END = 1 << 60  # no training comes that far
