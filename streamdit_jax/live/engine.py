"""The engine: three threads, their queues, and the sessions that they serve (StreamDiT §8, fig. 11).

    text encoder   encodes prompts and opens streams; whoever asks waits for it, the denoiser never does
    denoiser       one forward for all streams that can take a step; each has its own phase, prompt, seed and guidance
    decoder        what left a buffer becomes frames while the next forward runs; the state of each video is carried

Queues are bounded: a stream whose chunks are not taken, or whose input is late, sits out and the others go on. One lock
guards all bookkeeping; no thread holds it while it computes or waits for the device.
"""

import atexit
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax
import numpy as np

from streamdit_jax.endless import Forward
from streamdit_jax.errors import ConfigError
from streamdit_jax.live.batches import Batches
from streamdit_jax.live.measured import Measured
from streamdit_jax.live.questions import Questions
from streamdit_jax.live.session import EngineFull, EngineStopped, Session, SessionClosed
from streamdit_jax.live.streams import Streams
from streamdit_jax.partition import PartitionScheme, Refill
from streamdit_jax.pipeline import Pipeline
from streamdit_jax.snapshot import Snapshot
from streamdit_jax.steering import mix

logger = logging.getLogger("streamdit_jax")
CLOSE_SECONDS = 30.0  # how long closing waits for what the threads are computing
TICK_SECONDS = 0.1  # how often the denoiser looks at the clock while a camera is late
# Forwards that are dispatched before the one under way is done. A CPU gains nothing by it, and prompts wait longer.
AHEAD = {"cpu": 0}


class _Emission(NamedTuple):
    session: Session
    latents: jax.Array
    first_frame: int
    step: int


class Engine:
    """Serves live streams of one pipeline; a context manager, or `start` and `close`.

    slots: how many sessions there may be. scheme, filling: of all of them; the model's own unless given. queue_chunks:
    chunks of a session that may wait to be taken. per_chunk_prompts, refill: as `Pipeline.stream`.

    Raises ConfigError, naming the field.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        slots: int = 4,
        *,
        scheme: PartitionScheme | str | None = None,
        filling: str | None = None,
        queue_chunks: int = 2,
        per_chunk_prompts: bool = False,
        refill: Refill | str | None = None,
    ):
        for name, value in (("slots", slots), ("queue_chunks", queue_chunks)):
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1024:
                raise ConfigError(f"{name}: a whole number from 1 to 1024, not {value!r}")
        self.pipeline, self.slots, self.queue_chunks = pipeline, slots, queue_chunks
        self.changed = threading.Condition()
        self.streams = Streams(pipeline, scheme, filling, per_chunk_prompts, refill, self.changed)
        self.scheme, self.filling = self.streams.scheme, self.streams.filling
        self.batches = Batches(pipeline, self.scheme, self.filling, slots)
        self._sessions: list[Session] = []
        self._opening = 0
        # A CPU encodes beside the forward, which then need not wait; elsewhere one thing is done after another anyway.
        self._ahead = AHEAD.get(jax.default_backend(), 1)
        self._questions = Questions(self.changed, 2 * slots, self.check, ready=self._ahead == 0)
        self.ask = self._questions.ask
        self._emitted: deque[list[_Emission] | tuple[Session, Future]] = deque()
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self._error: tuple[str, BaseException] | None = None
        self._measured = Measured()

    # ---- life ----

    def __enter__(self) -> "Engine":
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.close()

    def start(self) -> "Engine":
        """Compiles everything that sessions will need, then starts the threads."""
        if self._threads or self._stopping:
            raise RuntimeError("engine: was started before")
        self._warm_up()
        for name, run in (
            ("text encoder", self._questions.run),
            ("denoiser", self._denoise),
            ("decoder", self._decode),
        ):
            self._threads.append(threading.Thread(target=self._guarded, args=(name, run), name=name, daemon=True))
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)  # a thread that computes while Python ends takes it down
        return self

    def close(self) -> None:
        """Ends all sessions and threads; waits for what they are computing, `CLOSE_SECONDS` at most."""
        atexit.unregister(self.close)
        self._halt(None)
        until = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
            if thread.is_alive():
                logger.warning("the %s did not end within %.0f s", thread.name, CLOSE_SECONDS)

    def _guarded(self, name: str, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            self._halt((name, error))

    def _halt(self, error: tuple[str, BaseException] | None) -> None:
        """Stops everything; whoever waits for something is told."""
        with self.changed:
            self._stopping = True
            self._error = self._error or error
            self._questions.stop(self._reason())
            while self._emitted:
                entry = self._emitted.popleft()
                if isinstance(entry, tuple) and not entry[1].done():
                    entry[1].set_exception(self._reason())
            for session in list(self._sessions):
                session.close()
            self.changed.notify_all()

    @property
    def failed(self) -> bool:
        """Whether a thread failed."""
        return self._error is not None

    def check(self) -> None:
        """Raises EngineStopped where a thread failed, SessionClosed where the engine was closed or never started."""
        if self._stopping or not self._threads:
            raise self._reason()

    def _reason(self) -> Exception:
        if self._error is not None:
            name, error = self._error
            stopped = EngineStopped(f"the {name} failed: {type(error).__name__}: {error}")
            stopped.__cause__ = error
            return stopped
        return SessionClosed("engine: was closed" if self._stopping else "engine: was not started")

    # ---- sessions ----

    @property
    def frame_rate(self) -> float:
        """Frames per second of the videos."""
        return self.pipeline.frame_rate

    @property
    def free_slots(self) -> int:
        """How many sessions may still be opened."""
        return self.slots - len(self._sessions) - self._opening

    def open(
        self,
        prompt: str = "",
        seed: int = 0,
        *,
        guidance: float | None = None,
        video: Iterable[np.ndarray] | None = None,
        image: np.ndarray | None = None,
        strength: float = 0.6,
        snapshot: Snapshot | None = None,
    ) -> Session:
        """A new session; video, image and strength as in `Pipeline.stream`. snapshot: continues one instead, and of the
        others only `video` is used, which is the rest of its input.

        EngineFull where no slot is free; otherwise raises as `Pipeline.stream` and `Pipeline.resume`.
        """
        with self.changed:
            self.check()
            if self.free_slots < 1:
                raise EngineFull(f"engine: all {self.slots} slots are taken; try again when a session was closed")
            self._opening += 1
        try:
            if snapshot is not None:
                stream = self.ask(lambda: self.streams.resumed(snapshot, video))
            else:
                if video is not None:
                    video = self.streams.started(video, fills=image is None)
                how = {"guidance": guidance, "video": video, "image": image, "strength": strength}
                stream = self.ask(lambda: self.streams.new(prompt, seed, **how))
        except BaseException:
            with self.changed:
                self._opening -= 1
            raise
        with self.changed:
            self._opening -= 1
            self.check()
            session = Session(self, stream)
            if stream.video is not None:
                self.streams.read_ahead(stream)
            if stream.unshown is not None:
                session.pending += 1
                self._emitted.append([_Emission(session, stream.unshown, 0, 0)])
                stream.unshown = None
            self._sessions.append(session)
            self.changed.notify_all()
        return session

    def leave(self, session: Session) -> None:
        """From a session that was closed: its slot is free. The lock is held."""
        if session in self._sessions:
            self._sessions.remove(session)

    def snapshot(self, session: Session) -> Snapshot:
        """See `Session.snapshot`."""
        with self.changed:
            self.changed.wait_for(lambda: not session.in_flight or self._stopping)
            session.check()
            complete, decoder = session.stream.freeze(), Future()
            self._emitted.append((session, decoder))  # behind what has left already
            self.changed.notify_all()
        return complete(decoder.result())

    # ---- the denoiser's thread ----

    def _denoise(self) -> None:
        under_way: deque[tuple[float, jax.Array]] = deque()
        ahead, finished = self._ahead, 0.0
        while True:
            group = self._next_group(wait=not under_way)
            if group is None:
                return
            if group:
                began = time.perf_counter()
                under_way.append((began, self._forward(group)))
            if ahead and group:
                with self.changed:  # a device does one thing after another: frames first, then the next forward
                    self.changed.wait_for(lambda: not self._emitted or self._stopping)
            while len(under_way) > (ahead if group else 0):
                began, front = under_way.popleft()
                front.block_until_ready()
                start, finished = max(began, finished), time.perf_counter()
                with self.changed:
                    self._measured.forward.append(finished - start)

    def _next_group(self, wait: bool) -> list[tuple[Session, Forward]] | None:
        """The streams that take the next step, and what they bring; None at the end, [] where none is ready."""
        with self.changed:
            while not self._stopping:
                now, group = time.perf_counter(), []
                for session in [one for one in self._sessions if one.wants_step(now, self.queue_chunks)]:
                    try:
                        group.append((session, session.stream.begin()))
                        session.in_flight = True
                    except Exception as error:  # its video cannot be read: nobody else's business
                        session.end(error)
                if group or not wait:
                    return group
                self.changed.wait(TICK_SECONDS if any(one.waits_for_camera for one in self._sessions) else None)
        return None

    def _forward(self, group: list[tuple[Session, Forward]]) -> jax.Array:
        """Dispatches one forward of a group; something to wait for."""
        states, fronts = self.batches.step([session.stream.state for session, _ in group], [f for _, f in group])
        with self.changed:
            emissions = []
            for (session, _), state, front in zip(group, states, fronts):
                stream, session.in_flight = session.stream, False
                latents = stream.finish(state, front)
                if latents is not None and not session.closed:
                    session.pending += 1
                    first = stream.table.frames_shown(stream.step - 1)
                    emissions.append(_Emission(session, latents, first, stream.step - 1))
            if emissions:
                self._emitted.append(emissions)
            self.changed.notify_all()
        return fronts[0]

    # ---- the decoder's thread ----

    def _decode(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._emitted or self._stopping)
                if self._stopping:
                    return
                entry = self._emitted[0]
            began, clean = time.perf_counter(), isinstance(entry, tuple) or all(one.latents.is_ready() for one in entry)
            decoded = [] if isinstance(entry, tuple) else self._decoded(entry)
            with self.changed:
                if self._stopping:
                    return
                self._emitted.popleft()  # now that it is on its way, the denoiser may send the next forward after it
                self.changed.notify_all()
            if isinstance(entry, tuple):
                session, decoder = entry
                decoder.set_result(session.stream.decoder)
                continue
            if not clean:  # the forward's time is not the decoder's
                jax.block_until_ready([emission.latents for emission in entry])
                began = time.perf_counter()
            chunks = [(emission, np.asarray(frames)[0]) for emission, frames in decoded]
            seconds = time.perf_counter() - began
            with self.changed:
                for one, frames in chunks:
                    one.session.deliver(frames, one.first_frame, one.step)
                    self._measured.delivered(len(frames))
                self._measured.decode.append(seconds)

    def _decoded(self, emissions: list[_Emission]) -> list[tuple[_Emission, jax.Array]]:
        """Dispatches the decoding of what one forward emitted: frames uint8 [1, n, height, width, 3] of each."""
        decoded = []
        for length in sorted({emission.latents.shape[1] for emission in emissions}):  # references are no chunks
            alike = [emission for emission in emissions if emission.latents.shape[1] == length]
            streams = [emission.session.stream for emission in alike]
            states = [stream.decoder for stream in streams]
            frames, states = self.batches.decode([emission.latents for emission in alike], states)
            for stream, state in zip(streams, states):
                stream.decoder = state
            for video in frames:
                video.copy_to_host_async()
            decoded += zip(alike, frames)
        return decoded

    # ---- what it is like ----

    def _warm_up(self) -> None:
        streams = [self.streams.new("") for _ in range(self.slots)]
        if not self.streams.per_chunk_prompts:
            text = self.pipeline.encode_prompt("")
            jax.block_until_ready(mix(text, text, np.float32(0.5)))
        self.batches.warm_up(streams)

    def stats(self) -> dict[str, Any]:
        """What the engine does at present: milliseconds of a forward and of a decoding, median and 99th percentile of
        the last ones; frames of all sessions per second over the last ten seconds. None where nothing was measured.
        """
        with self.changed:
            sessions = {"sessions": len(self._sessions), "slots": self.slots, "free_slots": self.free_slots}
            return {**sessions, **self._measured.report()}
