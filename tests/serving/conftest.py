"""A small engine of drawn pictures with the interface of live.Engine, and a real server around it on a free port."""

import contextlib
import json
import queue
import socket
import threading
import time

import numpy as np
import pytest
from websockets.sync.client import connect

from streamdit_jax.live import Chunk, EngineFull, Receipt
from streamdit_jax.serving import app as serving
from streamdit_jax.serving.protocol import HEADER, Kind, Limits, unpack
from streamdit_jax.snapshot import FACTS, Snapshot

SKIES = {"night": (14, 18, 46), "sunset": (250, 140, 90), "day": (130, 190, 240)}
COLOURS = {"red": (215, 40, 40), "blue": (40, 80, 220), "yellow": (240, 200, 40), "green": (30, 160, 70)}


def draw(prompt: str, seed: int, number: int, size: int) -> np.ndarray:
    """A car that drives under a sky: uint8 [size, size, 3], the same for the same arguments."""
    sky = next((sky for word, sky in SKIES.items() if word in prompt), SKIES["day"])
    colour = next((colour for word, colour in COLOURS.items() if word in prompt), (200, 200, 200))
    picture = np.empty((size, size, 3), np.uint8)
    picture[:] = sky
    picture[size * 2 // 3 :] = np.array(sky) // 2
    stripe = (np.arange(size) + 2 * number + seed) % 16 < 8
    picture[size * 5 // 6 :: 4, stripe] = 220
    left = size // 4 + number % 4
    picture[size // 2 : size * 3 // 4, left : left + size // 3] = colour
    return picture


class FakeSession:
    """One stream of drawn pictures. Frames are made when they are asked for, `engine.delay` seconds a chunk."""

    def __init__(self, engine, prompt, seed, image=None, frame=0):
        self.engine, self.prompt, self.seed, self.image, self.frame = engine, prompt, seed, image, frame
        self.guidance, self.strength, self.closed, self.paused = 1.0, 0.6, False, False
        self.fed, self.failure, self._last = [], None, time.perf_counter()
        self._turn = threading.Lock()  # a change comes before a chunk is drawn, or after

    def get(self, timeout=None):
        if self.failure is not None:
            raise self.failure
        if self.closed or self.paused:
            time.sleep(min(timeout or 0.01, 0.01))
            raise queue.Empty
        time.sleep(self.engine.delay)
        with self._turn:
            first, count = self.frame, self.engine.chunk
            frames = np.stack([self.picture(first + index) for index in range(count)])
            self.frame += count
        now = time.perf_counter()
        chunk = Chunk(frames, first, first // count, now - self._last)
        self._last = now
        return chunk

    def picture(self, number):
        if self.fed:
            return self.fed[-1]
        return self.image if self.image is not None else self.engine.draw(self.prompt, self.seed, number)

    def change(self, prompt, over=0):
        with self._turn:
            self.prompt = prompt
            return Receipt(self.frame // self.engine.chunk, self.frame, self.frame + (over + 2) * self.engine.chunk)

    def feed(self, frames):
        self.fed = [*frames][-1:]

    def pause(self):
        self.paused = True

    def resume(self):
        self.paused = False

    def snapshot(self):
        facts = {**dict.fromkeys(FACTS, 0), "fingerprint": "fake", "prompt": self.prompt, "row": self.frame}
        return Snapshot(facts, {"seed": np.array(self.seed)})

    def close(self):
        with self.engine.lock:
            if not self.closed:
                self.closed = True
                self.engine.free_slots += 1
                self.engine.sessions.remove(self)


class FakeEngine:
    """What serving asks of live.Engine."""

    scheme, failed = "N4c1s1", False

    def __init__(self, slots=4, size=64, chunk=4, frame_rate=64.0, delay=0.0):
        self.slots = self.free_slots = slots
        self.size, self.chunk, self.frame_rate, self.delay = size, chunk, frame_rate, delay
        self.sessions, self.lock = [], threading.Lock()

    def open(self, prompt="", seed=0, *, guidance=None, video=None, image=None, strength=0.6, snapshot=None):
        frame = 0
        if snapshot is not None:
            prompt, seed, frame = snapshot.facts["prompt"], int(snapshot.arrays["seed"]), snapshot.facts["row"]
        with self.lock:
            if not self.free_slots:
                raise EngineFull("engine: every slot is taken")
            self.free_slots -= 1
            session = FakeSession(self, prompt, seed, image, frame)
            session.strength, session.guidance = strength, 1.0 if guidance is None else guidance
            self.sessions.append(session)
        return session

    def draw(self, prompt, seed, number):
        """The picture that a session shows, when all it was given is a prompt."""
        return draw(prompt, seed, number, self.size)

    def stats(self):
        return {"forward_ms_median": 12.5, "frames_per_second": float("nan"), "sessions": len(self.sessions)}


class Client:
    """A viewer as a program: one websocket, and what it said sorted by type."""

    def __init__(self, socket, **hello):
        self.socket = socket
        self.say("hello", **hello)
        self.welcome = self.event("welcome")

    def say(self, kind, **fields):
        self.socket.send(json.dumps({"type": kind, **fields}))

    def next(self, timeout=60.0):
        """An event as a dict, or a binary message."""
        received = self.socket.recv(timeout)
        return json.loads(received) if isinstance(received, str) else unpack(received)

    def event(self, *kinds, timeout=60.0):
        """The next event of one of these kinds; what comes before is passed over."""
        return self.until(lambda message: isinstance(message, dict) and message["type"] in kinds, timeout)

    def binary(self, *kinds, timeout=60.0):
        return self.until(lambda message: not isinstance(message, dict) and message.kind in kinds, timeout)

    def picture(self, timeout=60.0):
        return self.binary(Kind.H264, Kind.JPEG, timeout=timeout)

    def until(self, wanted, timeout=60.0):
        until = time.monotonic() + timeout
        while True:
            message = self.next(max(0.01, until - time.monotonic()))
            if wanted(message):
                return message

    def upload(self, kind, payload, flags=0):
        self.socket.send(HEADER.pack(kind, flags, 0, 0) + payload)


class Running:
    """A server in a thread, on a free port of 127.0.0.1."""

    def __init__(self, engine, bound, server, service):
        self.engine, self.server, self.service = engine, server, service
        self.port = bound.getsockname()[1]
        self.http, self.ws = f"http://127.0.0.1:{self.port}/", f"ws://127.0.0.1:{self.port}/live"

    def connect(self, **options):
        """A bare websocket."""
        how = {"max_size": None, "compression": None, "proxy": None, "open_timeout": 10, "close_timeout": 2, **options}
        return connect(self.ws, **how)

    @contextlib.contextmanager
    def client(self, origin=None, **hello):
        with self.connect(origin=origin) as socket:
            yield Client(socket, **hello)

    def eventually(self, true, seconds=20.0):
        """Waits until something holds, and says whether it came to hold."""
        until = time.monotonic() + seconds
        while not true() and time.monotonic() < until:
            time.sleep(0.01)
        return true()


@pytest.fixture
def serve():
    """serve(limits=…, token=…, …, **of FakeEngine) → Running; stopped when the test ends. engine, size: a real one
    instead, and the size of its pictures.
    """
    running = []

    def start(
        *,
        engine=None,
        limits=None,
        hosts=("127.0.0.1", "localhost"),
        origins=(),
        examples=(),
        token=None,
        guidance=1.0,
        **of_engine,
    ):
        size = of_engine.get("size", 64)
        engine = FakeEngine(**of_engine) if engine is None else engine
        service = serving.Service(
            engine,
            height=size,
            width=size,
            model="roadtrip",
            guidance=guidance,
            examples=examples,
            limits=limits or Limits(sessions=engine.slots),
            token=token,
        )
        bound = socket.create_server(("127.0.0.1", 0))
        server = serving.server(serving.create_app(service, hosts=hosts, origins=origins), service)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        running.append((server, thread, service))
        until = time.monotonic() + 10
        while not server.started and time.monotonic() < until:
            time.sleep(0.01)
        return Running(engine, bound, server, service)

    yield start
    for server, thread, service in running:
        server.should_exit = True
        thread.join(15)
        service.threads.shutdown(wait=True, cancel_futures=True)
        assert not thread.is_alive(), "the server did not stop"
