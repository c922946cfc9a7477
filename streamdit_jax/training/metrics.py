"""Metrics and goodput on disk: one JSON object a line, and TensorBoard.

Both files are written at once and without buffers: metrics come a few times a minute, and when the disk is full, what
could not be written must not be left to a thread, nor to the end of the process.
"""

import json
import math
import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamdit_jax.errors import StreamDiTError

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends to `metrics.jsonl` and to `tensorboard/` in a directory; after a resume no step is there twice."""

    def __init__(self, directory: str | os.PathLike, *, step: int = 0, tensorboard: bool = True):
        """
        Args:
            directory: is made if it is missing.
            step: steps done so far. What an interrupted run wrote beyond it is dropped, a line torn by a crash too:
                those steps run again. Lines of goodput stay, for what was lost is part of it.
            tensorboard: whether to write event files (tensorboardX has their format and needs no TensorFlow).
        Raises:
            StreamDiTError: the directory or the file cannot be written.
        """
        self.path = Path(directory) / FILE_NAME
        self._board = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in _lines(self.path) if "started" in line or line["step"] <= step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            temporary.replace(self.path)
            self._file = self.path.open("ab", buffering=0)
            if tensorboard:
                self._board = _EventFile(self.path.parent / "tensorboard", step)
        except OSError as error:
            raise self._failure(error) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the metrics of one step; they are in the files when this returns.

        Args:
            step: steps done, 1 for the first.
            values: numbers. One that is not finite becomes null, because JSON has no other word for it; TensorBoard is
                not told of it.
        Raises:
            StreamDiTError: the disk is full, or gone.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            _write(self._file, (json.dumps({"step": step, **finite}) + "\n").encode())
            if self._board is not None:
                self._board.scalars(step, {name: value for name, value in finite.items() if value is not None})
        except OSError as error:
            raise self._failure(error) from error

    def write_goodput(self, line: Mapping[str, Any]) -> None:
        """Adds what this start of the run took so far, with "started" and "step" (see `training.goodput`); TensorBoard
        is not told. StreamDiTError as for `write`.
        """
        try:
            _write(self._file, (json.dumps(line) + "\n").encode())
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Closes both; everything has been written already."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _failure(self, error: OSError) -> StreamDiTError:
        reason = error.strerror or str(error)
        return StreamDiTError(
            f"{self.path}: metrics cannot be written: {reason}; mend it and run the same command again"
        )


class _EventFile:
    """An event file of TensorBoard: records of protocol buffers, each with its length and checksums.

    tensorboardX's own writer puts them through a queue to a thread. When the disk is full that thread dies, and
    training would wait for the queue for ever.
    """

    def __init__(self, directory: Path, step: int):
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import masked_crc32c

        self._event, self._checksum = event_pb2.Event, masked_crc32c
        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (directory / name).open("ab", buffering=0)
        self._add(event_pb2.Event(file_version="brain.Event:2"))
        if step:  # TensorBoard forgets what an interrupted run said of later steps
            started = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(event_pb2.Event(step=step + 1, session_log=started))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        event = self._event(step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._add(event)

    def close(self) -> None:
        self._file.close()

    def _add(self, event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        sums = (struct.pack("<I", self._checksum(part)) for part in (length, data))
        _write(self._file, length + next(sums) + data + next(sums))


def read_metrics(directory: str | os.PathLike) -> list[dict]:
    """The metrics of a directory's `metrics.jsonl`, a step a line, oldest first; none if there is no file."""
    return [line for line in _lines(Path(directory) / FILE_NAME) if "started" not in line]


def read_goodput(directory: str | os.PathLike) -> list[dict]:
    """The lines of goodput of a directory's `metrics.jsonl`, oldest first (see `training.goodput`)."""
    return [line for line in _lines(Path(directory) / FILE_NAME) if "started" in line]


def _lines(path: Path) -> list[dict]:
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:  # torn by a crash
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


def _write(file, data: bytes) -> None:
    """All of it, or OSError: an unbuffered file may take a part only, and say why at the next attempt."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
