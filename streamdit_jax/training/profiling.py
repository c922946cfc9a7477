"""A profile of a few steps of a run that is under way, for those who ask while it runs: SIGUSR1, or a file `profile` in
the stage's directory (`training.watch`). xprof and TensorBoard read what it writes."""

from collections.abc import Callable
from pathlib import Path

import jax

STEPS = 5


class Profile:
    """Traces the steps after a request into `DIRECTORY/step_N/process_P`."""

    def __init__(self, directory: Path, say: Callable[[str], None]):
        self._directory, self._say, self._until = directory, say, None

    def boundary(self, done: int, asked: bool, wait: Callable[[], object]) -> None:
        """After step `done` was dispatched. asked: whether to begin. wait: for the steps under way, so that all of
        those traced are in the trace, and none before them.
        """
        if self._until is not None and done >= self._until:
            wait()
            self.close()
        elif asked and self._until is None:
            wait()
            path = self._directory / f"step_{done:07d}" / f"process_{jax.process_index()}"
            try:
                jax.profiler.start_trace(path)
            except RuntimeError as error:  # someone else traces this process
                self._say(f"no profile of step {done}: {error}")
                return
            self._until = done + STEPS
            self._say(f"profiling {STEPS} steps after step {done} to {path}")

    def close(self) -> None:
        """Ends a trace that is under way."""
        if self._until is not None:
            self._until = None
            jax.profiler.stop_trace()
