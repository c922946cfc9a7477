"""When a viewer's next chunk is due: late enough to answer a new prompt at once, early enough never to stall."""

import asyncio
import time
from collections.abc import Callable


class Pace:
    """At most `ahead` frames wait at the viewer when the next chunk is fetched; what is not fetched, the engine does
    not compute (its queues are bounded), so a prompt reaches the picture after little more than `ahead` frames.

    An engine that takes long for a chunk is asked earlier: 1.25 times as many frames ahead as pass meanwhile, at most
    twice `ahead`. Viewers who acknowledge what they showed are paced by that, so by their own clock and their own
    network; for others the server's clock at `frame_rate` frames per second stands in.
    """

    def __init__(self, frame_rate: float, ahead: int, acknowledges: bool, clock: Callable[[], float] = time.monotonic):
        self._rate, self._acknowledges, self._clock = frame_rate, acknowledges, clock
        self._least, self._ahead, self._took = ahead, float(ahead), None
        self._moved = asyncio.Event()
        self.begin()

    def begin(self) -> None:
        """A new video: nothing of it was sent."""
        self._sent = self._shown = self._showed_at = None
        self._moved.set()

    def sent(self, first: int, count: int) -> None:
        """Frames first … first + count − 1 are on their way."""
        now = self._clock()
        if self._sent is None:
            self._shown, self._showed_at = first - 1, now
        elif not self._acknowledges and self._waiting(now) < 0:  # the viewer ran dry: its clock stood still meanwhile
            self._shown, self._showed_at = self._sent, now
        self._sent = first + count - 1

    def took(self, seconds: float) -> None:
        """How long a chunk took to come after it was due."""
        self._took = seconds if self._took is None else 0.75 * self._took + 0.25 * seconds
        self._ahead = min(max(self._least, 1.25 * self._took * self._rate), 2.0 * self._least)

    def shown(self, frame: int) -> None:
        """The viewer showed `frame`. What it cannot have shown counts as the last one sent."""
        if self._sent is not None and self._acknowledges:
            self._shown, self._showed_at = max(self._shown, min(frame, self._sent)), self._clock()
            self._moved.set()

    def freeze(self) -> None:
        """The viewer stands still from now on."""
        if self._sent is not None and not self._acknowledges:
            self._shown = min(self._sent, self._shown + self._elapsed(self._clock()))
        self._showed_at = None

    def go(self) -> None:
        """It goes on; or something large went first, and it could not show what waits behind that."""
        if self._showed_at is None or self._acknowledges:
            self._showed_at = self._clock()

    def stalled(self) -> float:
        """Seconds since a viewer who acknowledges showed something, while frames wait for it."""
        behind = self._acknowledges and self._sent is not None and self._sent - self._shown > self._ahead
        return self._clock() - self._showed_at if behind and self._showed_at is not None else 0.0

    async def due(self) -> None:
        """Returns when the next chunk should be fetched."""
        while self._sent is not None:
            too_many = self._waiting(self._clock()) - self._ahead
            if too_many <= 0:
                return
            self._moved.clear()
            if self._acknowledges:
                await self._moved.wait()
            else:
                await asyncio.sleep(too_many / self._rate)

    def _waiting(self, now: float) -> float:
        return self._sent - self._shown - (0 if self._acknowledges else self._elapsed(now))

    def _elapsed(self, now: float) -> float:
        return 0.0 if self._showed_at is None else (now - self._showed_at) * self._rate
