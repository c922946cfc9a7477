"""One viewer's WebSocket: greets, listens, plays, watches, and leaves nothing behind. (Protocol: docs/live.md.)"""

import asyncio
import contextlib
import hmac
import logging
import time

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from streamdit_jax.errors import StreamDiTError
from streamdit_jax.live import EngineFull
from streamdit_jax.serving.playing import Played, Player, load_snapshot
from streamdit_jax.serving.protocol import (
    KEY,
    STILL,
    Allowance,
    Binary,
    Kind,
    Message,
    ProtocolError,
    event,
    pack,
    unpack,
)
from streamdit_jax.serving.video import decode_jpeg
from streamdit_jax.snapshot import Snapshot

logger = logging.getLogger(__name__)

# Close codes: an application's own lie between 4000 and 4999.
MALFORMED, UNWELCOME, IDLE, SLOW = 4400, 4401, 4408, 4409
BYTES_PER_SECOND = 50_000  # the slowest line that a large message waits for
REQUESTS = {"start", "prompt", "set", "snapshot", "download"}
WITHOUT_SESSION = {"start", "stop", "alive", "download", "keyframe"}


class Leave(Exception):
    """The connection ends: a close code and a reason in plain words."""

    def __init__(self, code: int, reason: str):
        super().__init__(reason)
        self.code, self.reason = code, reason


class Viewer:
    """Serves one accepted WebSocket until it closes; `service` is what all viewers share (app.Service)."""

    def __init__(self, websocket: WebSocket, service):
        self._socket, self._service, self._limits = websocket, service, service.limits
        limits = self._limits
        self._rate = Allowance(service.messages_per_second, 2 * service.messages_per_second)
        self._requests = Allowance(limits.requests_per_second, 2 * limits.requests_per_second)
        self._offences = Allowance(limits.offences_per_minute / 60, limits.offences_per_minute)
        self._sending = asyncio.Lock()
        self._player: Player | None = None
        self._upload: np.ndarray | Snapshot | None = None
        self._heard = time.monotonic()
        self._patience = limits.stall_seconds

    async def run(self) -> None:
        """Returns when the connection has ended, from either side."""
        tasks, leave = [], None
        try:
            self._player = await self._greet()
            tasks = [asyncio.create_task(task()) for task in (self._listen, self._play, self._watch)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Leave as reason:
            leave = reason
        except WebSocketDisconnect:
            pass
        finally:
            # Shielded: a server that stops does not wait for ever, and what was opened is closed all the same.
            await asyncio.shield(asyncio.ensure_future(self._finish(tasks, leave)))

    async def _finish(self, tasks: list[asyncio.Task], leave: Leave | None) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._player is not None:  # before any goodbye, which a slow reader would make last
            await self._player.leave()
        if leave is not None:
            with contextlib.suppress(WebSocketDisconnect, RuntimeError, TimeoutError):
                async with asyncio.timeout(1):
                    await self._socket.close(leave.code, leave.reason)
        abort = self._socket.scope.get("extensions", {}).get("streamdit.abort")
        if abort is not None:  # a peer that reads nothing would hold its socket for ever
            asyncio.get_running_loop().call_later(2.0, abort)

    async def _greet(self) -> Player:
        try:
            async with asyncio.timeout(self._limits.hello_seconds):
                first = await self._socket.receive()
        except TimeoutError:
            raise Leave(MALFORMED, f"no hello within {self._limits.hello_seconds:g} s") from None
        if first["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(first.get("code", 1005))
        try:
            hello = self._service.parser.parse(first.get("text") or "")
        except ProtocolError as mistake:
            await self._error("malformed", mistake)
            raise Leave(MALFORMED, "the first message must be a hello") from None
        if hello.type != "hello":
            raise Leave(MALFORMED, "the first message must be a hello")
        token = self._service.token
        if token and not hmac.compare_digest(hello.fields["token"].encode(), token.encode()):
            await asyncio.sleep(1)  # guessing takes time
            raise Leave(UNWELCOME, "the token is missing or wrong")
        facts = self._service.facts
        codec = "h264" if "h264" in hello.fields["codecs"] and facts["codec_string"] else "jpeg"
        player = Player(self._service, codec, hello.fields["acknowledges"])
        await self._send(event("welcome", **facts, codec=codec, free=self._service.free_seats))
        return player

    # Sending

    async def _send(self, message: str | bytes) -> None:
        """One sender at a time, and none who waits for ever: a reader who takes nothing is left."""
        async with self._sending:
            patience, self._patience = self._patience, self._limits.stall_seconds
            self._patience += len(message) / BYTES_PER_SECOND  # what the next one may have to wait for
            try:
                async with asyncio.timeout(patience):
                    await (self._socket.send_bytes if isinstance(message, bytes) else self._socket.send_text)(message)
            except TimeoutError:
                raise Leave(SLOW, f"nothing was read for {patience:.0f} s") from None
            except RuntimeError:  # Starlette's word for a socket that has closed meanwhile
                raise WebSocketDisconnect(1006) from None

    async def _error(self, code: str, mistake: object, number: int | None = None) -> None:
        await self._send(event("error", code=code, message=str(mistake), id=number))

    # Listening

    async def _listen(self) -> None:
        while True:
            received = await self._socket.receive()
            if received["type"] == "websocket.disconnect":
                return
            number = None
            try:
                if not self._rate.take():
                    most = self._service.messages_per_second
                    raise ProtocolError(f"message: more than {most:g} messages per second; this one was dropped")
                if received.get("text") is not None:
                    message = self._service.parser.parse(received["text"])
                    number = message.id
                    await self._on_message(message)
                else:
                    await self._on_binary(unpack(received.get("bytes") or b""))
            except ProtocolError as mistake:
                await self._error("malformed", mistake, number)
                if not self._offences.take():
                    raise Leave(MALFORMED, "too many malformed messages") from None
            except EngineFull as mistake:
                await self._error("full", mistake, number)
            except StreamDiTError as mistake:
                await self._error("refused", mistake, number)
            except (Leave, WebSocketDisconnect):
                raise
            except Exception:
                logger.exception("a viewer's message failed")
                await self._error("failed", "the server could not do this; its log says why", number)

    async def _on_message(self, message: Message) -> None:
        if message.type == "shown":
            if message.fields["video"] == self._player.video:
                self._player.pace.shown(message.fields["frame"])
            return
        if message.type == "hello":
            raise ProtocolError("hello: was said already")
        self._heard = time.monotonic()
        if message.type not in WITHOUT_SESSION and self._player.session is None:
            raise StreamDiTError(f"{message.type}: nothing is streaming; send start first")
        if message.type in REQUESTS and not self._requests.take():
            raise StreamDiTError(f"{message.type}: at most {self._limits.requests_per_second:g} of these per second")
        answer = await getattr(self, f"_on_{message.type}")(**message.fields)
        if isinstance(answer, bytes):
            await self._send(answer)
            self._player.pace.go()
        elif answer is not None:
            await self._send(event(**answer, id=message.id))
        elif message.id is not None:
            await self._send(event("done", id=message.id))
        if message.type == "start":  # no picture of a video comes before its announcement
            self._player.running.set()

    async def _on_binary(self, binary: Binary) -> None:
        if binary.kind in (Kind.RGB, Kind.JPEG):
            picture = await self._picture(binary)
            if binary.flags & STILL:
                self._heard, self._upload = time.monotonic(), picture
            elif self._player.session is None:
                raise StreamDiTError("camera: nothing is streaming; start with source camera first")
            else:
                await self._player.thread(self._player.session.feed, picture[None])
        elif binary.kind is Kind.SNAPSHOT:
            self._heard = time.monotonic()
            self._upload = await self._player.thread(load_snapshot, binary.payload)
        else:
            raise ProtocolError(f"binary message: kind {binary.kind.value} {binary.kind.name} only goes to viewers")

    async def _picture(self, binary: Binary) -> np.ndarray:
        height, width = self._service.facts["height"], self._service.facts["width"]
        whole = height * width * 3
        if binary.kind is Kind.JPEG and len(binary.payload) <= whole:
            return await self._player.thread(decode_jpeg, binary.payload, height, width)
        if len(binary.payload) != whole:
            raise ProtocolError(f"picture: {len(binary.payload)} bytes; {width}×{height} in RGB has {whole}")
        return np.frombuffer(binary.payload, np.uint8).reshape(height, width, 3)

    # What a viewer may ask for; each answers with an event's fields, bytes (a binary message) or None

    async def _on_start(self, prompt, seed, guidance, strength, source) -> dict:
        needed = {"image": np.ndarray, "snapshot": Snapshot}.get(source)
        if needed is not None and not isinstance(self._upload, needed):
            raise StreamDiTError(f"start: source {source} needs one, sent as a binary message before")
        if source == "snapshot":
            resumed = str(self._upload.facts["prompt"])
            await self._player.start(snapshot=self._upload)
            if prompt is not None and prompt != resumed:  # a fork
                await self._player.thread(self._player.session.change, prompt)
            prompt = resumed if prompt is None else prompt
        else:
            given = {"guidance": guidance, "strength": strength}
            how = {name: value for name, value in given.items() if value is not None}
            if source == "image":
                how["image"] = self._upload
            await self._player.start(prompt=prompt, seed=seed, **how)
        self._upload = None
        return {"kind": "started", "video": self._player.video, "prompt": prompt, "seed": seed, "source": source}

    async def _on_prompt(self, prompt, over) -> dict:
        player = self._player
        receipt = await player.thread(player.session.change, prompt, over)
        return {"kind": "receipt", "video": player.video, "prompt": prompt, "over": over, **receipt._asdict()}

    async def _on_set(self, guidance, strength) -> None:
        for name, value in (("guidance", guidance), ("strength", strength)):
            if value is not None:
                await self._player.thread(setattr, self._player.session, name, value)

    async def _on_pause(self) -> None:
        await self._player.pause()

    async def _on_resume(self) -> None:
        await self._player.resume()

    async def _on_stop(self) -> None:
        await self._player.leave()

    async def _on_alive(self) -> None:
        """Nothing to do: that it was said is what counts."""

    async def _on_keyframe(self) -> None:
        self._player.want_key = True

    async def _on_snapshot(self) -> bytes:
        return pack(Kind.SNAPSHOT, await self._player.snapshot(), video=self._player.video)

    async def _on_download(self) -> bytes:
        return pack(Kind.MP4, await self._player.last_minute(), video=self._player.video)

    # Playing, and watching over it

    async def _play(self) -> None:
        while True:
            try:
                played = await self._player.next()
            except Exception as mistake:
                await self._send(event("ended", reason=self._reason(mistake)))
                continue
            if played is not None:
                await self._send_chunk(played)

    async def _send_chunk(self, played: Played) -> None:
        chunk, pictures, encode_seconds = played
        video, first = self._player.video, int(chunk.first_frame)
        facts = {
            "first_frame": first,
            "frames": len(pictures),
            "step": int(chunk.step),
            "seconds": float(chunk.seconds),
        }
        await self._send(event("chunk", video=video, **facts, encode_ms=1000 * encode_seconds))
        for number, picture in enumerate(pictures, first):
            flags = KEY if picture.key else 0
            await self._send(pack(self._player.kind, picture.data, flags=flags, video=video, frame=number))
        self._player.pace.sent(first, len(pictures))

    @staticmethod
    def _reason(mistake: Exception) -> str:
        if isinstance(mistake, StreamDiTError):
            return str(mistake)
        logger.error("a stream failed", exc_info=mistake)
        return "the stream failed; the server's log says why"

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._limits.idle_seconds / 4, self._limits.stall_seconds / 4))
            if time.monotonic() - self._heard > self._limits.idle_seconds:
                raise Leave(IDLE, f"no sign of you for {self._limits.idle_seconds:g} s")
            if self._player.running.is_set():
                if self._player.pace.stalled() > self._patience:
                    raise Leave(SLOW, f"nothing was shown for {self._patience:.0f} s")
                await self._send(event("stats", **self._service.stats()))
