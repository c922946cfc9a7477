"""One viewer's stream in a live engine: what it hands over, and how it is steered while it runs (StreamDiT §8)."""

import queue
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from streamdit_jax.endless import Stream
from streamdit_jax.errors import StreamDiTError
from streamdit_jax.snapshot import Snapshot
from streamdit_jax.timetable import Receipt
from streamdit_jax.video_input import Camera, ReadAhead

CAMERA_SECONDS = 1.0  # without a frame, and a stream goes on without its camera


class EngineFull(StreamDiTError):
    """Every slot of the engine is taken."""


class SessionClosed(StreamDiTError):
    """The session, or its engine, was closed."""


class EngineStopped(RuntimeError):
    """A thread of the engine failed; its error is the cause. The engine and all of its sessions are at an end."""


class Chunk(NamedTuple):
    """frames: uint8 [n, height, width, 3]. first_frame: the number of frames[0] in the session's video. step: the micro
    step that they left with. seconds: wall time since the chunk before, or since the session was opened.
    """

    frames: np.ndarray
    first_frame: int
    step: int
    seconds: float


class Session(Iterator[Chunk]):
    """An endless video from `Engine.open`: iterate over it, or `get`. Every method may be called from any thread.

    A session is paused while `queue_chunks` of its chunks wait to be taken, and others go on.
    """

    def __init__(self, engine: Any, stream: Stream):
        self._engine, self._changed = engine, engine.changed
        self.stream = stream  # the engine's: use the session's methods
        self.camera: Camera | None = None
        self.paused = self.closed = self.in_flight = False
        self.pending = 0  # chunks on their way: in the decoder, or waiting to be taken
        self._chunks: deque[Chunk] = deque()
        self._error: BaseException | None = None
        self.waits_for_camera = False
        self._last = time.perf_counter()

    # ---- what comes out ----

    def get(self, timeout: float | None = None) -> Chunk:
        """The next chunk. queue.Empty where none came within `timeout` seconds; SessionClosed where none will come;
        EngineStopped, or the error of its input video, where something failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self.closed or self._engine.failed, timeout)
            self._engine.check()
            if self._chunks:
                self.pending -= 1
                self._changed.notify_all()
                return self._chunks.popleft()
            if self._error is not None:
                raise self._error
            if self.closed:
                raise SessionClosed("session: was closed")
        raise queue.Empty

    def __next__(self) -> Chunk:
        try:
            return self.get()
        except SessionClosed:
            raise StopIteration from None

    def deliver(self, frames: np.ndarray, first_frame: int, step: int) -> None:
        """From the decoder: a chunk is ready."""
        now = time.perf_counter()
        if not self.closed:
            self._chunks.append(Chunk(frames, first_frame, step, now - self._last))
        self._last = now
        self._changed.notify_all()

    # ---- what steers it ----

    @property
    def seed(self) -> int:
        return self.stream.seed

    @property
    def prompt(self) -> str:
        """What the video shows."""
        return self.stream.prompt

    def change(self, prompt: str, over: int = 0) -> Receipt:
        """A new prompt, interpolated over so many chunks, or at once; returns when it is under way, with where it will
        be seen. StreamDiTError for a prompt that is too long, ConfigError for an impossible `over`.
        """
        text, cached = self._engine.ask(lambda: self._engine.streams.heard(prompt))
        with self._changed:
            self.check()
            return self.stream.change(prompt, over, text=text, cached=cached)

    @property
    def guidance(self) -> float:
        """Classifier-free guidance; takes effect at the next micro step. ConfigError for what cannot be."""
        return self.stream.guidance

    @guidance.setter
    def guidance(self, guidance: float) -> None:
        with self._changed:
            self.check()
            self.stream.guidance = guidance

    @property
    def strength(self) -> float:
        """How far the input video is left behind, for frames that enter from now on."""
        return self.stream.strength

    @strength.setter
    def strength(self, strength: float) -> None:
        with self._changed:
            self.check()
            self.stream.strength = strength

    def feed(self, frames: Iterable[np.ndarray]) -> None:
        """Appends frames uint8 [n, height, width, 3] of a camera to the input, and never waits: of a camera that is
        faster than the stream frames are dropped, of a slower one they are repeated. ConfigError for other frames, and
        where a video is being read.
        """
        # Copies: cameras write into their buffers again.
        frames = [np.array(frame) for frame in self._engine.streams.frames(frames, "frames")]
        with self._changed:
            self.check()
            if self.camera is None:
                self.camera = self._engine.streams.camera(self.stream)
            self.camera.feed(frames)

    def pause(self) -> None:
        """Stands still after the step under way; its slot stays taken."""
        with self._changed:
            self.check()
            self.paused = True

    def resume(self) -> None:
        """Goes on."""
        with self._changed:
            self.check()
            self.paused = False
            self._changed.notify_all()

    # ---- at rest ----

    def snapshot(self) -> Snapshot:
        """The stream between two micro steps: `Engine.open(snapshot=…)` and `Pipeline.resume` continue it with the
        frames after those that are on their way here.
        """
        return self._engine.snapshot(self)

    def log(self) -> dict[str, Any]:
        """What `Pipeline.replay` needs to make this video again."""
        with self._changed:
            return self.stream.log()

    def close(self) -> None:
        """Frees the slot; chunks that were not taken are gone. Closing twice is closing once."""
        self.end(None)

    def end(self, error: BaseException | None) -> None:
        """Closes the session, for a reason that its reader is told."""
        with self._changed:
            if self.closed:
                return
            self.closed, self._error = True, error
            if error is None:
                self._chunks.clear()
            self._engine.leave(self)
            if isinstance(self.stream.video, ReadAhead):
                self.stream.video.close()
            if self.camera is not None:
                self.camera.close()
            self._changed.notify_all()

    def check(self) -> None:
        """Raises where the session, or its engine, is at an end."""
        self._engine.check()
        if self.closed:
            raise SessionClosed("session: was closed")

    # ---- for the denoiser, which holds the lock ----

    def wants_step(self, now: float, queue_chunks: int) -> bool:
        """Whether the next forward should take this stream along."""
        stream, self.waits_for_camera = self.stream, False
        if self.paused or self.in_flight:
            return False
        if stream.forwards_until_frames == 1 and self.pending >= queue_chunks:
            return False
        if not stream.next_advances or not isinstance(stream.video, ReadAhead) or stream.video.ready:
            return True
        if self.camera is None:
            return False
        # A camera that is slow gives what it has; one that gives nothing is not waited for.
        self.camera.want()
        self.waits_for_camera = now - self.camera.fed_at < CAMERA_SECONDS
        return not self.waits_for_camera
