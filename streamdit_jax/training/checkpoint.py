"""Checkpoints by Orbax: asynchronous, exact, and verified.

A checkpoint of step n is a directory `n/` with the train state and one JSON object: the data position, the
configuration, and each leaf's shape, type and checksum. Orbax does not notice a flipped bit in its data files, so the
checksums are taken on the devices before saving and compared after restoring. What does not agree is a
`CheckpointError` that says what is wrong and what to do.
"""

import contextlib
import functools
import json
import logging
import math
import os
import re
import sys
import traceback
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from streamdit_jax.errors import CheckpointError
from streamdit_jax.sharding import path_name

FORMAT = 1


class Restored(NamedTuple):
    """What a checkpoint held: the state, the next batch's number, and the configuration it was saved with."""

    state: Any
    next_step: int
    config: Any


@jax.jit
def checksums(tree) -> list[jax.Array]:
    """A uint32 for each leaf, in the order of `jax.tree.leaves`: Σ bits(xᵢ)·(odd number of i) mod 2³².

    An odd factor is invertible, so one flipped bit always changes the sum; and a sum of integers is the same in every
    order, so it does not depend on the number of devices.
    """

    def one(x):
        x = jnp.asarray(x)
        if x.dtype == jnp.bool_:
            x = x.astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])
        index = jnp.zeros(x.shape, jnp.uint32)
        for axis in range(x.ndim):  # the flat index without a reshape, which would gather a sharded array
            stride = math.prod(x.shape[axis + 1 :]) % 2**32
            index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
        # Multiplied by a large odd constant before it is made odd, so that neighbours' factors differ in many bits.
        return jnp.sum(bits.astype(jnp.uint32) * ((index * jnp.uint32(2654435761)) | jnp.uint32(1)), dtype=jnp.uint32)

    return [one(x) for x in jax.tree.leaves(tree)]


def describe(tree) -> dict[str, list]:
    """path → [shape, dtype] of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


class Checkpoints:
    """The checkpoints of one run. Every process of a run makes the same calls in the same order."""

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3):
        """
        Args:
            directory: where; made if it is missing.
            keep: how many of the newest are kept.
        Raises:
            CheckpointError: the directory cannot be made or read.
        """
        self.directory = Path(os.path.abspath(directory))
        _quieten()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.directory}: cannot hold checkpoints: {_brief(error)}") from error

    def steps(self) -> list[int]:
        """Steps whose checkpoint is complete on disk, in order. A save that failed is not among them."""
        return sorted(ocp.utils.checkpoint_steps(self.directory))  # the manager's own list is of what was asked for

    def latest(self) -> int | None:
        """The newest of `steps()`, None if there is none."""
        return max(self.steps(), default=None)

    def save(self, step: int, state, *, next_step: int, config: Any = None) -> None:
        """Starts saving and returns once the state is copied, so that its buffers may be donated.

        A step that is there already is left as it is.

        Args:
            step: names the checkpoint.
            state: a tree of arrays.
            next_step: the data position, one integer: the batch that the next step will read.
            config: anything that JSON can say.
        Raises:
            CheckpointError: this save could not start, or an earlier one did not end well.
        """
        self.wait()
        if step in self.steps():
            return
        sums = [int(x) for x in jax.device_get(checksums(state))]
        leaves = {name: [*about, checksum] for (name, about), checksum in zip(describe(state).items(), sums)}
        meta = {"format": FORMAT, "step": step, "next_step": next_step, "config": config, "leaves": leaves}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave({**meta, "crc32": _crc32(meta)}),
        )
        with self._saving():
            self._manager.save(step, args=arguments, force=True)

    def check(self) -> None:
        """Raises CheckpointError if a save in the background has failed; does not wait."""
        with self._saving():
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits for the save in the background. Raises CheckpointError if it failed."""
        with self._saving():
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def preempted(self, step: int) -> bool:
        """Whether a run of several processes is about to lose its machines; the same answer on all, once a step."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Releases Orbax's threads, without a word about saves that failed: `wait` is what tells."""
        with contextlib.suppress(Exception):
            self._manager.close()

    def restore(self, like, step: int | None = None) -> Restored:
        """The checkpoint of a step, verified leaf by leaf.

        Args:
            like: a tree of `jax.ShapeDtypeStruct` with shardings (`sharding.abstract_arrays`): what this run's state
                looks like and where it shall live; the mesh may be another than the one that saved.
            step: which, default the newest.
        Raises:
            CheckpointError: there is none; it belongs to another configuration; a file of it is missing, truncated or
                altered. The message says which older step is intact, if one is. Nothing older is ever taken silently.
        """
        wanted = self.latest() if step is None else step
        if wanted is None or wanted not in self.steps():
            which = (
                "no checkpoint is there" if wanted is None else f"no step {wanted} is there; there are {self.steps()}"
            )
            raise CheckpointError(f"{self.directory}: {which}")
        try:
            return self._restore(wanted, like)
        except _Foreign as error:
            raise CheckpointError(
                f"{self.directory / str(wanted)}: written with another configuration: {error}; "
                "go on with that configuration, or use another directory"
            ) from error
        except _Damaged as error:
            raise CheckpointError(
                f"{self.directory / str(wanted)}: damaged: {error}; {self._advice(wanted, like)}"
            ) from error

    def _advice(self, damaged: int, like) -> str:
        for older in reversed([step for step in self.steps() if step < damaged]):
            try:
                self._restore(older, like)
            except (_Foreign, _Damaged):
                continue
            return f"step {older} is intact: delete {self.directory / str(damaged)} to go on from there"
        return "no older step is intact: delete the directory to begin anew"

    def _restore(self, step: int, like) -> Restored:
        meta = self._meta(step)
        expected = describe(like)
        stored = {name: [shape, dtype] for name, (shape, dtype, _) in meta["leaves"].items()}
        for name in [*expected, *stored]:
            here, there = expected.get(name), stored.get(name)
            if here != there:
                raise _Foreign(f"{name} is {_about(there)} there and {_about(here)} here")
        try:
            state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(like))).state
        except Exception as error:  # Orbax and TensorStore raise all kinds for files that are missing or cut short
            raise _Damaged(_brief(error)) from error
        for name, checksum in zip(expected, jax.device_get(checksums(state))):
            if int(checksum) != meta["leaves"][name][2]:
                raise _Damaged(f"{name} has other values than those that were saved")
        return Restored(state, meta["next_step"], meta["config"])

    def _meta(self, step: int) -> dict:
        try:
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            crc32 = meta.pop("crc32")
        except Exception as error:
            raise _Damaged(f"its description cannot be read: {_brief(error)}") from error
        if crc32 != _crc32(meta):
            raise _Damaged("its description has other values than those that were saved")
        if meta["format"] != FORMAT:
            raise _Foreign(f"its format is {meta['format']}, this version reads {FORMAT}")
        return meta

    def _saving(self) -> "_Saving":
        return _Saving(self)


class _Saving:
    """Turns what goes wrong while saving into one line."""

    def __init__(self, checkpoints: Checkpoints):
        self._checkpoints = checkpoints

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if error is not None and isinstance(error, Exception):
            latest = self._checkpoints.latest()
            kept = "no earlier one is there" if latest is None else f"step {latest} is there and complete"
            raise CheckpointError(
                f"{self._checkpoints.directory}: saving a checkpoint failed: {_brief(error)}; {kept}; "
                "check the disk's free space and run the same command again"
            ) from error


class _Damaged(Exception):
    pass


class _Foreign(Exception):
    pass


def _crc32(meta: dict) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _about(leaf: list | None) -> str:
    return "missing" if leaf is None else f"{leaf[1]}{leaf[0]}"


def _brief(error: BaseException, width: int = 240) -> str:
    """The message in one line; the cause at the bottom of a chain says more than its wrappers."""
    while error.__cause__ is not None:
        error = error.__cause__
    if found := re.search(r"os_error_code='?(\d+)", str(error)):  # TensorStore's, at the end of a long story
        return os.strerror(int(found[1]))
    text = re.sub(r"\s*\[(tensorstore_spec|source locations)[^=]*=.*", "", str(error), flags=re.DOTALL)
    text = re.sub(r"\s+", " ", text).strip() or type(error).__name__
    return text if len(text) <= width else f"{text[: width // 3]} … {text[-2 * width // 3 :]}"


@functools.cache
def _quieten() -> None:
    """Orbax tells each failure many times: in logs, from threads, coroutines and futures that outlive their event loop.

    A `CheckpointError` says it once. So these are dropped, and nothing else is.
    """

    def of_orbax(trace) -> bool:
        frames = [] if trace is None else traceback.extract_tb(trace)
        return any("orbax" in frame.filename for frame in frames)

    def foreign(record: logging.LogRecord) -> bool:
        return "orbax" not in f"{record.pathname} {record.msg}" and not of_orbax((record.exc_info or (None,) * 3)[2])

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(foreign)

    def hook(unraisable, previous=sys.unraisablehook):
        if not of_orbax(unraisable.exc_traceback) and str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    sys.unraisablehook = hook
