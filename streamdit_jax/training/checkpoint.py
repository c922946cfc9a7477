"""Checkpoints by Orbax: asynchronous, exact, and verified.

A checkpoint of step n is a directory `n/` with the train state and one JSON object: the data position, the
configuration, and each leaf's shape, type and checksum. Orbax does not notice a flipped bit in its data files, so the
checksums are taken on the devices before saving and compared after restoring.

A checkpoint that is damaged is set aside under another name, `n.damaged`, with the reason in a file beside it, and the
one before it is used; it is never deleted. All processes of a run decide so together. One that belongs to another
configuration is a `CheckpointError`, and so is a directory without an intact one: nothing begins anew silently.
"""

import contextlib
import functools
import itertools
import json
import logging
import os
import re
import sys
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from etils import epath

from streamdit_jax.errors import CheckpointError
from streamdit_jax.sharding import path_name
from streamdit_jax.training.agreement import gather
from streamdit_jax.training.checksums import checked, checksums

FORMAT = 1


class Restored(NamedTuple):
    """What the checkpoint of a step held: the state, the next batch's number, and the configuration of that time."""

    step: int
    state: Any
    next_step: int
    config: Any


def describe(tree) -> dict[str, list]:
    """path → [shape, dtype] of every leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): [list(leaf.shape), str(leaf.dtype)] for path, leaf in leaves}


class Checkpoints:
    """The checkpoints of one run. Every process of a run makes the same calls in the same order."""

    def __init__(self, directory: str | os.PathLike, *, keep: int = 3, say: Callable[[str], None] = print):
        """
        Args:
            directory: where; made if it is missing.
            keep: how many of the newest are kept. Damaged ones do not count.
            say: takes a line about a checkpoint that was set aside.
        Raises:
            CheckpointError: the directory cannot be made or read.
        """
        self.directory, self._say = Path(os.path.abspath(directory)), say
        self._pending = False  # whether a save was begun of which nobody yet asked how it ended
        _quieten()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.directory}: cannot hold checkpoints: {_brief(error)}") from error

    def steps(self) -> list[int]:
        """Steps whose checkpoint is complete on disk, in order: what process 0 sees. A save that failed is not among
        them."""
        return json.loads(gather(json.dumps(self._steps()))[0])

    def latest(self) -> int | None:
        """The newest of `steps()`; None before the first. CheckpointError if there were some and all are damaged."""
        steps, damaged = json.loads(gather(json.dumps([self._steps(), self._damaged()]))[0])
        if damaged and not steps:
            raise CheckpointError(
                f"{self.directory}: no intact checkpoint is left; {', '.join(damaged)} were set aside, with the "
                "reasons in files beside them; to begin anew, use another directory"
            )
        return max(steps, default=None)

    def save(self, step: int, state, *, next_step: int, config: Any = None) -> None:
        """Starts saving and returns once the state is copied, so that its buffers may be donated.

        A step that is there already is left as it is.

        Args:
            step: names the checkpoint.
            state: a tree of arrays.
            next_step: the data position, one integer: the batch that the next step will read.
            config: anything that JSON can say.
        Raises:
            CheckpointError: this save could not start, or an earlier one did not end well; or a value of the state is
                not finite, and the message names the leaf: no checkpoint ever holds one.
        """
        self.wait()
        if step in self.steps():
            return
        sums, sound = jax.device_get(checked(state))
        about = describe(state)
        for name, finite in zip(about, sound):
            if not finite:
                raise CheckpointError(
                    f"{self.directory / str(step)}: not saved: {name} has values that are not finite; {self._kept()}"
                )
        leaves = {name: [*kind, int(checksum)] for (name, kind), checksum in zip(about.items(), sums)}
        meta = {"format": FORMAT, "step": step, "next_step": next_step, "config": config, "leaves": leaves}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            meta=ocp.args.JsonSave({**meta, "crc32": _crc32(meta)}),
        )
        self._pending = True
        with self._saving():
            self._manager.save(step, args=arguments, force=True)

    def check(self) -> None:
        """Raises CheckpointError if a save in the background has failed; does not wait."""
        # The manager's own check_for_errors says nothing: its thread has taken the error to tell whoever waits for it.
        if self._pending and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in the background. Raises CheckpointError if it failed."""
        self._pending = False
        with self._saving():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Releases Orbax's threads, without a word about saves that failed: `wait` is what tells."""
        with contextlib.suppress(Exception):
            self._manager.close()

    def restore(self, like, step: int | None = None) -> Restored:
        """A checkpoint, verified leaf by leaf.

        Args:
            like: a tree of `jax.ShapeDtypeStruct` with shardings (`sharding.abstract_arrays`): what this run's state
                looks like and where it shall live; the mesh, and the number of processes, may be others than those that
                saved.
            step: this one and no other. By default the newest that is intact: damaged ones are set aside.
        Raises:
            CheckpointError: there is none; it belongs to another configuration; the one that was asked for is damaged,
                or all are. The message names the leaf or the file.
        """
        there = self.steps()
        if step is not None and step not in there:
            raise CheckpointError(f"{self.directory}: no step {step} is there; there are {there}")
        if self.latest() is None:
            raise CheckpointError(f"{self.directory}: no checkpoint is there")
        for candidate in reversed(there) if step is None else [step]:
            path = self.directory / str(candidate)
            try:
                return self._restore(candidate, like)
            except _Foreign as error:
                raise CheckpointError(
                    f"{path}: written with another configuration: {error}; "
                    "go on with that configuration, or use another directory"
                ) from error
            except _Unreadable as error:
                raise CheckpointError(
                    f"{path}: cannot be read: {error}; mend it and run the same command again"
                ) from error
            except _Damaged as error:
                if step is not None:
                    raise CheckpointError(f"{path}: damaged: {error}") from error
                self._set_aside(path, str(error))
        self.latest()  # raises
        raise AssertionError("a checkpoint that was set aside is there")

    def _steps(self) -> list[int]:
        # The manager's own list is of what was asked for; saves under way and damaged ones have longer names.
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdecimal())

    def _damaged(self) -> list[str]:
        return sorted(path.name for path in self.directory.glob("*.damaged*") if path.is_dir())

    def _set_aside(self, path: Path, reason: str) -> None:
        """Renames a checkpoint, by process 0; CheckpointError on all processes where that cannot be."""
        problem = ""
        if jax.process_index() == 0:
            names = itertools.chain([f"{path.name}.damaged"], (f"{path.name}.damaged.{n}" for n in itertools.count(2)))
            aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
            try:
                path.rename(aside)
                aside.with_name(f"{aside.name}.txt").write_text(f"{reason}\n", encoding="utf-8")
            except OSError as error:
                problem = f"{path}: damaged: {reason}; it cannot be set aside: {_brief(error)}"
            else:
                self._say(f"{path}: damaged: {reason}; set aside as {aside.name}")
        if problem := gather(problem)[0]:
            raise CheckpointError(problem)
        self._manager.reload()

    def _restore(self, step: int, like) -> Restored:
        """Raises the same on all processes, whichever of them met it. Orbax's handlers are called without its manager,
        which would wait for all processes where one has failed.
        """
        meta = state = failure = None
        try:
            meta = self._meta(step)
            _require_same_leaves(meta["leaves"], describe(like))
            state = self._read(ocp.StandardCheckpointHandler, step, "state", ocp.args.StandardRestore(like))
        except (_Damaged, _Foreign, _Unreadable) as error:
            failure = error
        kinds = {kind.__name__: kind for kind in (_Foreign, _Unreadable, _Damaged)}
        said = gather(json.dumps([type(failure).__name__, str(failure)]) if failure else "")
        for process, (kind, reason) in enumerate(json.loads(text) if text else ("", "") for text in said):
            if kind:
                raise kinds[kind](reason if len(said) == 1 else f"{reason} (on process {process})") from failure
        for name, checksum in zip(describe(like), jax.device_get(checksums(state))):
            if int(checksum) != meta["leaves"][name][2]:
                raise _Damaged(f"{name} has other values than those that were saved")
        return Restored(step, state, meta["next_step"], meta["config"])

    def _meta(self, step: int) -> dict:
        meta = self._read(ocp.JsonCheckpointHandler, step, "meta", ocp.args.JsonRestore())
        if not isinstance(meta, dict) or meta.pop("crc32", None) != _crc32(meta):
            raise _Damaged("its description (meta) has other values than those that were saved")
        if meta["format"] != FORMAT:
            raise _Foreign(f"its format is {meta['format']}, this version reads {FORMAT}")
        return meta

    def _read(self, handler: Callable, step: int, item: str, args) -> Any:
        reader = handler()
        try:
            return reader.restore(epath.Path(self.directory / str(step) / item), args=args)
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError) as error:  # not the checkpoint's fault
            raise _Unreadable(_brief(error)) from error
        except Exception as error:  # Orbax and TensorStore raise all kinds for files that are missing or cut short
            raise _Damaged(f"{item}: {_brief(error)}") from error
        finally:
            reader.close()

    def _kept(self) -> str:
        latest = max(self._steps(), default=None)
        return "no earlier one is there" if latest is None else f"step {latest} is there and complete"

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
            raise CheckpointError(
                f"{self._checkpoints.directory}: saving a checkpoint failed: {_brief(error)}; "
                f"{self._checkpoints._kept()}; check the disk's free space and run the same command again"
            ) from error


class _Damaged(Exception):
    """Its files do not say what was saved."""


class _Foreign(Exception):
    """It is the state of something else."""


class _Unreadable(Exception):
    """This process could not read it, which says nothing of its files."""


def _require_same_leaves(leaves: dict[str, list], expected: dict[str, list]) -> None:
    stored = {name: [shape, dtype] for name, (shape, dtype, _) in leaves.items()}
    for name in [*expected, *stored]:
        here, there = expected.get(name), stored.get(name)
        if here != there:
            raise _Foreign(f"{name} is {_about(there)} there and {_about(here)} here")


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
