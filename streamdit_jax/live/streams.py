"""The streams of an engine: new ones, continued ones, and what steers them from outside."""

import itertools
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np

from streamdit_jax.endless import Stream
from streamdit_jax.errors import ConfigError
from streamdit_jax.models.text_cache import CachedText, Text
from streamdit_jax.partition import PartitionScheme, Refill
from streamdit_jax.pipeline import Pipeline
from streamdit_jax.snapshot import Snapshot
from streamdit_jax.steering import KEEPS_PROMPTS
from streamdit_jax.timetable import Timetable
from streamdit_jax.video_input import Camera, ReadAhead, frames_of

PIECES_AHEAD = 2  # of a video that is read before they are needed


class Streams:
    """Streams of one scheme, one filling and one kind of prompts, which can share forwards.

    refill: as `Pipeline.stream`. changed: the engine's lock. Raises ConfigError, naming the field, for a scheme, a
    filling or a refill that cannot be.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        scheme: PartitionScheme | str | None,
        filling: str | None,
        per_chunk_prompts: bool,
        refill: Refill | str | None,
        changed: threading.Condition,
    ):
        self._pipeline, self._changed = pipeline, changed
        self.scheme, self.filling = pipeline.scheme(scheme), filling or pipeline.config.sampling.filling
        self.per_chunk_prompts = per_chunk_prompts
        refill = pipeline.refill(self.scheme, self.filling, per_chunk_prompts) if refill is None else refill
        try:
            self.refill = Timetable(self.scheme, self.filling, pipeline.latent_frames, refill=refill).refill
        except ValueError as mistake:
            raise ConfigError(str(mistake)) from None
        if self.refill.chunks and per_chunk_prompts:
            raise ConfigError(KEEPS_PROMPTS)

    def new(self, prompt: str, seed: int = 0, **how: Any) -> Stream:
        """As `Pipeline.stream`."""
        of_all = {"scheme": self.scheme, "filling": self.filling, "refill": self.refill}
        return self._pipeline.stream(prompt, seed, per_chunk_prompts=self.per_chunk_prompts, **of_all, **how)

    def heard(self, prompt: str) -> tuple[Text, CachedText | None]:
        """A prompt's encoding, and what the step takes of it alone: here, and not before the next forward."""
        text = self._pipeline.encode_prompt(prompt)
        return text, None if self.per_chunk_prompts else self._pipeline.cache_text(text)

    def resumed(self, snapshot: Snapshot, video: Iterable[np.ndarray] | None) -> Stream:
        """As `Pipeline.resume`; ConfigError where the snapshot's stream is of another kind."""
        stream = self._pipeline.resume(snapshot, video=video)
        for name, value in (("scheme", str(self.scheme)), ("filling", self.filling)):
            if stream.start[name] != value:
                raise ConfigError(f"snapshot: has {name} {stream.start[name]}, but the engine streams with {value}")
        if stream.start["per_chunk_prompts"] != self.per_chunk_prompts:
            raise ConfigError("snapshot: its prompts are per chunk and the engine's are not, or the other way about")
        return stream

    def frames(self, frames: Iterable[np.ndarray], name: str) -> Iterable[np.ndarray]:
        """Frames of the model's size, checked one by one; ConfigError, beginning with `name`, for others."""
        return frames_of(frames, self._pipeline.config.data.height, self._pipeline.config.data.width, name)

    def started(self, video: Iterable[np.ndarray], *, fills: bool) -> Iterable[np.ndarray] | None:
        """A video whose first frames are read: here no one but its owner waits for them. fills: the buffer starts from
        it. None for a video without frames, which is how a camera's session begins.
        """
        frames = self.frames(video, "video")
        count = self.scheme.buffer_size if fills else self.scheme.chunk_size
        first = list(itertools.islice(frames, count * self._pipeline.latent_frames))
        return itertools.chain(first, frames) if first else None

    def read_ahead(self, stream: Stream) -> None:
        """From now on the stream's video is read by a thread of its own."""
        stream.video = ReadAhead(stream.video, self.scheme.chunk_size, self._changed, ahead=PIECES_AHEAD)

    def camera(self, stream: Stream) -> Camera:
        """A camera for a stream; ConfigError where it reads a video. The lock is held."""
        if isinstance(stream.video, ReadAhead) and not stream.video.ended:
            raise ConfigError("frames: this session reads a video already; open one without it to feed frames")
        count = self.scheme.chunk_size
        camera = Camera(count * self._pipeline.latent_frames, self._changed)
        video = self._pipeline.video_input(camera, stream.encoder, stream.frames_read)
        stream.read(ReadAhead(video, count, self._changed, ahead=1))
        return camera
