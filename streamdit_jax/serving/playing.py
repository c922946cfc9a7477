"""What one viewer watches: at most one session of the engine, its encoder, its pace, and the last minute.

Nothing is queued here: a chunk is fetched when it is due and encoded at once. While the network is slow, the engine's
own bounded queue makes this session wait, and no other.
"""

import asyncio
import functools
import queue
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from streamdit_jax.errors import StreamDiTError
from streamdit_jax.live import Chunk, EngineFull
from streamdit_jax.serving.pace import Pace
from streamdit_jax.serving.protocol import Kind
from streamdit_jax.serving.video import ENCODERS, Picture, Recent, to_mp4
from streamdit_jax.snapshot import Snapshot

GET_SECONDS = 0.25  # how long a thread waits for a chunk before it looks whether anyone still wants it
SEAT_SECONDS = 5.0  # how long a restart waits for the slot it has just left


class Played(NamedTuple):
    """A chunk as its viewer gets it: one encoded picture for each frame, and the seconds that encoding took."""

    chunk: Chunk
    pictures: list[Picture]
    encode_seconds: float


class Player:
    """Opens, steers and ends sessions one after another; `service` is what all viewers share (app.Service).

    `session` is None between them. `video` counts them; a viewer tells late frames of the last from the first of the
    next by it. Encoder and last minute go on from one to the next.
    """

    def __init__(self, service, codec: str, acknowledges: bool):
        facts, limits = service.facts, service.limits
        self._service, self._rate = service, facts["frame_rate"]
        self._encoder = ENCODERS[codec](facts["height"], facts["width"], self._rate)
        self._recent = Recent(round(limits.recent_seconds * self._rate), limits.recent_bytes)
        self.kind = Kind.H264 if codec == "h264" else Kind.JPEG
        self.pace = Pace(self._rate, facts["ahead"], acknowledges)
        self.running = asyncio.Event()  # there is a session, and it is not paused
        self.session: Any = None
        self.video, self.want_key = 0, True
        self._waited = 0.0  # seconds since a chunk was due
        self._seated, self._changing = False, asyncio.Lock()

    async def thread(self, function, *arguments, **options):
        """Runs what may wait or compute in the service's threads."""
        call = functools.partial(function, *arguments, **options)
        return await asyncio.get_running_loop().run_in_executor(self._service.threads, call)

    async def start(self, **how) -> None:
        """Ends what is playing and opens a session, which plays once `running` is set. EngineFull where others hold
        every seat; the engine's errors.
        """
        async with self._changing:
            if not self._seated:
                self._service.take_seat()
                self._seated = True
            await self._end()
            try:
                self.session = await self._open(how)
            except BaseException:
                self._leave_seat()
                raise
            self._waited = 0.0
            self.video, self.want_key = (self.video + 1) % 2**16, True
            self.pace.begin()

    async def _open(self, how: dict[str, Any]):
        # The seat is ours, but the slot of the session before may take a step to become free.
        until = time.monotonic() + SEAT_SECONDS
        while True:
            opening = asyncio.ensure_future(self.thread(self._service.engine.open, **how))
            try:
                return await asyncio.shield(opening)
            except asyncio.CancelledError:  # the viewer left meanwhile: the session must not outlive it
                opening.add_done_callback(_close_orphan)
                raise
            except EngineFull:
                if time.monotonic() > until:
                    raise
            await asyncio.sleep(0.05)

    async def _end(self) -> None:
        session, self.session = self.session, None
        self.running.clear()
        if session is not None:
            await asyncio.shield(self.thread(session.close))

    async def leave(self, session=None) -> None:
        """Closes the session and gives the seat to whoever waits; nothing where another session than the given one
        plays by now.
        """
        async with self._changing:
            if session is None or session is self.session:
                try:
                    await self._end()
                finally:
                    self._leave_seat()

    def _leave_seat(self) -> None:
        if self._seated:
            self._seated = False
            self._service.leave_seat()

    async def pause(self) -> None:
        """Stands still; the seat stays taken."""
        self.running.clear()
        self.pace.freeze()
        await self.thread(self.session.pause)

    async def resume(self) -> None:
        """Goes on."""
        await self.thread(self.session.resume)
        self.pace.go()
        self.running.set()

    async def next(self) -> Played | None:
        """The next chunk when it is due; None where none came in time or the video it belongs to has ended. Raises the
        engine's error after leaving.
        """
        await self.running.wait()
        session = self.session
        await self.pace.due()
        if session is not self.session or not self.running.is_set():
            return None
        try:
            played = await self.thread(self._take, session)
        except Exception:
            if session is self.session:
                await self.leave(session)
                raise
            return None
        if session is not self.session:
            self.want_key = True  # what was encoded is not sent, so nothing may refer to it
            return None
        return played

    def _take(self, session) -> Played | None:
        began = time.monotonic()
        chunk = _get(session)
        self._waited += time.monotonic() - began
        if chunk is None:
            return None
        if chunk.first_frame > 0:  # before the first, the buffer was filled
            self.pace.took(self._waited)
        self._waited = 0.0
        began, pictures = time.perf_counter(), []
        for frame in chunk.frames:
            key, self.want_key = self.want_key, False
            pictures.append(self._encoder.encode(frame, key))
            self._recent.append(pictures[-1])
        return Played(chunk, pictures, time.perf_counter() - began)

    async def snapshot(self) -> bytes:
        """The session at rest, as the bytes of one file."""
        return await self.thread(lambda session: dump_snapshot(session.snapshot()), self.session)

    async def last_minute(self) -> bytes:
        """What was played last, as the bytes of an MP4. StreamDiTError before the first picture."""
        return await self.thread(to_mp4, self._recent.pictures(), self._encoder.name, self._rate)


def _get(session) -> Chunk | None:
    try:
        return session.get(timeout=GET_SECONDS)
    except queue.Empty:
        return None


def _close_orphan(opening: asyncio.Future) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def load_snapshot(data: bytes) -> Snapshot:
    """A viewer's snapshot. StreamDiTError where it is damaged or none; nothing is unpickled."""
    with tempfile.TemporaryDirectory(prefix="streamdit-") as directory:
        path = Path(directory) / "upload.snap"
        path.write_bytes(data)
        try:
            return Snapshot.load(path)
        except StreamDiTError as mistake:
            raise StreamDiTError(str(mistake).replace(str(path), "snapshot")) from None
        except Exception:  # facts of other types than a snapshot has
            raise StreamDiTError("snapshot: is damaged or no snapshot") from None


def dump_snapshot(snapshot: Snapshot) -> bytes:
    """The bytes that `Snapshot.save` writes."""
    with tempfile.TemporaryDirectory(prefix="streamdit-") as directory:
        path = Path(directory) / "stream.snap"
        snapshot.save(path)
        return path.read_bytes()
