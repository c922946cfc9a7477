"""What a live engine measures of itself, for whoever watches it."""

import time
from collections import deque
from typing import Any

import numpy as np

LAST = 500  # forwards and decodings that count
WINDOW_SECONDS = 10.0  # of frames that count


class Measured:
    """Durations of the last forwards and decodings, and the frames of the last seconds. Its owner guards it."""

    def __init__(self):
        self.forward: deque[float] = deque(maxlen=LAST)
        self.decode: deque[float] = deque(maxlen=LAST)
        self._delivered: deque[tuple[float, int]] = deque()

    def delivered(self, frames: int) -> None:
        """So many frames were handed over."""
        self._delivered.append((time.perf_counter(), frames))
        self._forget()

    def _forget(self) -> None:
        while self._delivered and self._delivered[0][0] < time.perf_counter() - WINDOW_SECONDS:
            self._delivered.popleft()

    def report(self) -> dict[str, Any]:
        """Milliseconds, median and 99th percentile; frames per second of all sessions together. None where nothing was
        measured.
        """
        self._forget()
        report = {}
        for name, seconds in (("forward", self.forward), ("decode", self.decode)):
            for label, share in (("median", 50), ("p99", 99)):
                value = round(1000 * float(np.percentile(seconds, share)), 3) if seconds else None
                report[f"{name}_ms_{label}"] = value
        span = time.perf_counter() - self._delivered[0][0] if self._delivered else 0.0
        # What came first came from before the window: it is no part of the rate.
        frames = sum(count for _, count in list(self._delivered)[1:])
        report["frames_per_second"] = round(frames / span, 2) if span > 0.5 else None
        return report
