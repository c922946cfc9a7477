"""Metrics on disk: one JSON object a line, and TensorBoard."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from streamdit_jax.errors import StreamDiTError

FILE_NAME = "metrics.jsonl"


class MetricsWriter:
    """Appends to `metrics.jsonl` and to `tensorboard/` in a directory; after a resume no step is there twice."""

    def __init__(self, directory: str | os.PathLike, *, step: int = 0, tensorboard: bool = True):
        """
        Args:
            directory: is made if it is missing.
            step: steps done so far. What an interrupted run wrote beyond it is dropped, a line torn by a crash too:
                those steps run again.
            tensorboard: whether to write event files (through tensorboardX, which needs no TensorFlow).
        Raises:
            StreamDiTError: the directory or the file cannot be written.
        """
        self.path = Path(directory) / FILE_NAME
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = [line for line in _lines(self.path) if line["step"] <= step]
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            temporary.replace(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise StreamDiTError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        self._board = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self.path.parent / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the metrics of one step; they are in the file when this returns.

        Args:
            step: steps done, 1 for the first.
            values: numbers. One that is not finite becomes null, because JSON has no other word for it; TensorBoard is
                not told of it.
        Raises:
            StreamDiTError: the disk is full, or gone.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in finite.items():
                    if value is not None:
                        self._board.add_scalar(name, value, step)
        except OSError as error:
            raise StreamDiTError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_metrics(directory: str | os.PathLike) -> list[dict]:
    """All lines of a directory's `metrics.jsonl`, oldest first; none if there is no file."""
    return _lines(Path(directory) / FILE_NAME)


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
