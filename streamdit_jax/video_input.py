"""Frames that steer a stream: a video, a camera or any iterator, as latents (StreamDiT §5.4).

The autoencoder is causal and its state is carried: a video that is encoded piece by piece is the video encoded whole.
"""

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from streamdit_jax.errors import ConfigError


class Piece(NamedTuple):
    """A piece of an input video. latents: [1, count, h, w, C], of which the first `length` are the video's; then what
    its reader knows after it: the encoder's state, and the frames read so far.
    """

    latents: Float[Array, "1 f h w c"]
    length: int
    state: Any
    frames_read: int


def frames_of(video: Iterable[np.ndarray], height: int, width: int, name: str = "video") -> Iterator[np.ndarray]:
    """Frames uint8 [height, width, 3] of an array [n, height, width, 3], or of an iterable of frames or such arrays.

    Raises ConfigError, beginning with `name`, for anything else; of an iterable when it comes to it.
    """
    try:
        items = iter(video)
    except TypeError:
        raise ConfigError(f"{name}: uint8 [{height}, {width}, 3] are needed, not {type(video).__name__}") from None

    def checked(item):
        item = np.asarray(item)
        if item.dtype != np.uint8 or item.ndim not in (3, 4) or item.shape[-3:] != (height, width, 3):
            raise ConfigError(
                f"{name}: {item.dtype} {list(item.shape)} given; the model takes uint8 [{height}, {width}, 3]"
            )
        return item.reshape(-1, height, width, 3)

    return (frame for item in items for frame in checked(item))


class VideoInput:
    """Reads an input video, a few latent frames at a time.

    encode: uint8 [n, H, W, 3] and the encoder's state → latents [1, n / latent_frames, h, w, C] and the state to carry
    on. state, frames_read: where a video that is continued stands.
    """

    def __init__(self, encode: Callable, frames: Iterator[np.ndarray], latent_frames: int, state=None, frames_read=0):
        self._encode, self._frames, self._latent_frames = encode, frames, latent_frames
        self.state, self.frames_read = state, frames_read

    def take(self, count: int) -> Piece | None:
        """The next `count` latent frames; fewer where the video ends; None after its end."""
        frames = list(itertools.islice(self._frames, count * self._latent_frames))
        if not frames:
            return None
        self.frames_read += len(frames)
        length = -(-len(frames) // self._latent_frames)
        # A video that ends within a piece is completed by its last frame: shapes never change.
        frames += [frames[-1]] * (count * self._latent_frames - len(frames))
        latents, self.state = self._encode(np.stack(frames), self.state)
        return Piece(jax.block_until_ready(latents), length, self.state, self.frames_read)


class Camera(Iterator[np.ndarray]):
    """Frames that someone feeds while a stream runs, in bursts of `burst`: the newest of a fast camera; of a slow one,
    when the stream can wait no longer, those that are there, each repeated. Ends when it is closed.
    """

    def __init__(self, burst: int, changed: threading.Condition):
        self._fed: deque[np.ndarray] = deque(maxlen=burst)
        self._burst: list[np.ndarray] = []
        self._changed, self._wanted, self._closed = changed, False, False
        self.fed_at = float("-inf")

    def feed(self, frames: Iterable[np.ndarray]) -> None:
        """Appends frames [height, width, 3]; never waits."""
        with self._changed:
            self._fed.extend(frames)
            self.fed_at = time.perf_counter()
            self._changed.notify_all()

    def want(self) -> None:
        """The stream needs a burst now."""
        with self._changed:
            if not self._wanted:
                self._wanted = True
                self._changed.notify_all()

    def close(self) -> None:
        """Ends the video."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __next__(self) -> np.ndarray:
        if not self._burst:
            with self._changed:
                self._changed.wait_for(self._is_ready)
                if self._closed:
                    raise StopIteration
                size = self._fed.maxlen
                self._burst = [self._fed[place * len(self._fed) // size] for place in range(size)][::-1]
                self._fed.clear()
                self._wanted = False
        return self._burst.pop()

    def _is_ready(self) -> bool:
        return self._closed or len(self._fed) == self._fed.maxlen or (self._wanted and len(self._fed) > 0)


class ReadAhead:
    """Reads a video ahead of a live stream, in a thread of its own: a file or a camera that is slow holds up no one
    else.

    count: latent frames of a piece. ahead: pieces that may wait. changed: notified when there is a piece; guards all.
    """

    def __init__(self, video: VideoInput, count: int, changed: threading.Condition, *, ahead: int):
        self._video, self._count, self._changed, self._ahead = video, count, changed, ahead
        self._pieces: deque[Piece] = deque()
        self._error: BaseException | None = None
        self._ended = self._closed = False
        self.thread = threading.Thread(target=self._run, name="video input", daemon=True)
        self.thread.start()

    @property
    def ready(self) -> bool:
        """Whether `take` knows its answer."""
        return bool(self._pieces) or self._ended

    @property
    def ended(self) -> bool:
        """Whether `take` has given all there is."""
        return self._ended and not self._pieces

    def take(self, count: int) -> Piece | None:
        """The next piece, None after the video's end; raises what reading it raised. Does not wait: see `ready`."""
        if self._pieces:
            self._changed.notify_all()
            return self._pieces.popleft()
        if self._error is not None:
            raise self._error
        return None

    def close(self) -> None:
        """Stops reading; a frame that the video is waiting for is waited for, but no other."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or len(self._pieces) < self._ahead)
                    if self._closed:
                        return
                piece = self._video.take(self._count)
                if piece is None:
                    return
                with self._changed:
                    self._pieces.append(piece)
                    self._changed.notify_all()
        except Exception as error:
            self._error = error
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
