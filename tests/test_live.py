"""The live engine: sessions that share forwards, their queues, their threads, and how all of it ends (StreamDiT §8)."""

import itertools
import queue
import threading
import time

import jax
import numpy as np
import pytest

import streamdit_jax as sd
from streamdit_jax.bench.compilations import Compilations
from streamdit_jax.errors import ConfigError, StreamDiTError
from streamdit_jax.live import Engine, EngineFull, EngineStopped, SessionClosed
from streamdit_jax.live import engine as live_engine

PATIENCE = 120  # seconds; a machine under load is no failure


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return sd.load(tiny_model)


@pytest.fixture(scope="module")
def started(pipeline):
    with Engine(pipeline, slots=4) as engine:  # compiled for 1, 2 and 4: three sessions leave one place idle
        yield engine


@pytest.fixture
def engine(started):
    """One engine for all tests; what a test that fails leaves open troubles no other."""
    yield started
    for session in list(started._sessions):
        session.close()


def take(session, frames):
    """So many frames from the start, and the chunks they came in."""
    chunks = []
    while sum(len(chunk.frames) for chunk in chunks) < frames:
        chunks.append(session.get(timeout=PATIENCE))
    return np.concatenate([chunk.frames for chunk in chunks])[:frames], chunks


def alone(stream, frames):
    made = []
    while sum(map(len, made)) < frames:
        made.append(next(stream))
    return np.concatenate(made)[:frames]


def same(frames, others):
    """To rounding: another batch size may add up in another order."""
    assert frames.shape == others.shape
    assert np.abs(frames.astype(int) - others).max() <= 1


def test_a_session_alone_is_the_stream(engine, pipeline):
    session = engine.open("a red car", seed=4)
    frames, chunks = take(session, 40)
    assert np.array_equal(frames, alone(pipeline.stream("a red car", seed=4), 40)), "bit for bit: the same program"
    assert [chunk.first_frame for chunk in chunks] == [0, 8, 16, 24, 32]
    assert all(chunk.frames.dtype == np.uint8 and chunk.seconds > 0 for chunk in chunks)
    assert [chunk.step for chunk in chunks] == [7, 9, 11, 13, 15]
    session.close()
    assert engine.free_slots == 4


def test_sessions_join_and_leave_without_recompiling_and_each_shows_its_own_video(engine, pipeline):
    texts = ["a red car", "a blue bus at night", "snow"]
    with Compilations() as compilations:
        first = engine.open(texts[0], seed=0)
        start, _ = take(first, 16)
        second = engine.open(texts[1], seed=1, guidance=1.0)
        third = engine.open(texts[2], seed=2)
        frames = [take(session, 24)[0] for session in (second, third)]
        second.close()
        assert second.closed and engine.free_slots == 2
        fourth, fifth = engine.open(texts[1], seed=7), engine.open("")
        with pytest.raises(EngineFull, match="all 4 slots"):
            engine.open("one too many")
        rest, _ = take(first, 24)
        start_of_fourth, _ = take(fourth, 16)
        first.change(texts[2])
        fourth.change(texts[0], over=2)
        fourth.guidance = 0.5
        for session in (first, fourth):
            take(session, 24)
    assert compilations.count == 0
    same(np.concatenate([start, rest]), alone(pipeline.stream(texts[0], seed=0), 40))
    same(frames[0], alone(pipeline.stream(texts[1], seed=1, guidance=1.0), 24))
    same(frames[1], alone(pipeline.stream(texts[2], seed=2), 24))
    same(start_of_fourth, alone(pipeline.stream(texts[1], seed=7), 16))
    for session in (first, third, fourth, fifth):
        session.close()
    with pytest.raises(SessionClosed):
        third.get(timeout=PATIENCE)
    assert list(third) == []


def test_forwards_of_several_streams_take_nothing_from_the_host(engine):
    """Three of them and an idle one, at different steps of filling and streaming."""
    streams = [engine.streams.new(text, seed) for seed, text in enumerate(("a red car", "snow", "a bus"))]

    def forward(streams):
        forwards = [stream.begin() for stream in streams]
        states, fronts = engine.batches.step([stream.state for stream in streams], forwards)
        for stream, state, front in zip(streams, states, fronts):
            stream.finish(state, front)

    forward(streams)
    for _ in range(9):
        forward(streams[:2])  # the rows of filling, and all that repeat
    with jax.transfer_guard_host_to_device("disallow_explicit"):
        for _ in range(8):
            forward(streams)


def test_receipts_and_logs(engine, pipeline):
    """A change reaches the picture exactly where its receipt says, and the log replays it."""
    session = engine.open("a red car", seed=3)
    take(session, 8)
    receipt = session.change("a blue bus at night", over=1)
    session.guidance = 1.5
    assert receipt.first_frame >= 8 and session.prompt == "a blue bus at night" and session.guidance == 1.5
    frames, chunks = take(session, receipt.complete_frame + 8)
    unchanged = alone(pipeline.stream("a red car", seed=3), len(frames) + 8)[8:]
    differs = np.abs(frames.astype(int) - unchanged[: len(frames)]).max(axis=(1, 2, 3)) > 1
    assert chunks[0].first_frame == 8
    assert int(np.argmax(differs)) + 8 >= receipt.first_frame and differs[receipt.first_frame :].any()
    log = session.log()
    session.close()
    replayed = alone(pipeline.replay(log), 8 + len(frames))[8:]
    assert np.array_equal(frames, replayed)


def test_a_session_that_is_not_read_waits_and_others_go_on(engine):
    lazy, busy = engine.open("a red car", seed=0), engine.open("a bus", seed=1)
    take(busy, 8 * 12)
    steps = lazy.stream.step
    assert lazy.pending == engine.queue_chunks
    take(busy, 8 * 4)
    assert lazy.stream.step == steps, "it stands before the step that would make one chunk too many"
    chunks = take(lazy, 8 * 6)[1]
    assert [chunk.first_frame for chunk in chunks] == list(range(0, 48, 8)), "and nothing is lost"
    busy.pause()
    while busy.pending or busy.in_flight:
        with pytest.raises(queue.Empty):
            while True:
                busy.get(timeout=0.2)
    stands = busy.stream.step
    take(lazy, 16)
    assert busy.stream.step == stands
    busy.resume()
    take(busy, 8)
    for session in (lazy, busy):
        session.close()


def test_snapshots_of_a_running_session(engine, pipeline):
    """Forked into two prompts; with the same prompt it goes on bit for bit, here and in a pipeline."""
    session = engine.open("a red car", seed=6)
    take(session, 16)
    snapshot = session.snapshot()
    first = 8 * ((snapshot.facts["log"]["steps"] - 6) // 2)
    rest = [session.get(timeout=PATIENCE) for _ in range(5)]
    frames = np.concatenate([chunk.frames for chunk in rest if chunk.first_frame >= first])
    session.close()
    assert np.array_equal(frames, alone(pipeline.resume(snapshot), len(frames)))
    fork, same_prompt = engine.open(snapshot=snapshot), engine.open(snapshot=snapshot)
    fork.change("a blue bus at night")
    other, chunks = take(fork, len(frames))
    assert chunks[0].first_frame == first and not np.array_equal(other, frames)
    same(take(same_prompt, len(frames))[0], frames)
    fork.close()
    same_prompt.close()
    with pytest.raises(ConfigError, match="snapshot: has scheme N4c2s1"):
        engine.open(snapshot=pipeline.stream("a car", scheme="N4c2s1").snapshot())
    assert engine.free_slots == 4


def test_videos_images_and_cameras(engine, pipeline):
    rng = np.random.default_rng(0)
    video = rng.integers(0, 255, (60, 16, 16, 3), np.uint8)
    session = engine.open("a red car", seed=2, video=iter(video), strength=0.5)
    frames, _ = take(session, 72)
    log = session.log()
    assert np.array_equal(frames, alone(pipeline.stream("a red car", seed=2, video=video, strength=0.5), 72))
    session.close()
    assert np.array_equal(frames, alone(pipeline.replay(log, video=video), 72))

    session = engine.open("a red car", seed=2, video=())
    session.feed(video[:1])  # a camera may be there at once
    session.close()
    session = engine.open("a red car", seed=2, image=video[0], video=())
    take(session, 16)
    with pytest.raises(ConfigError, match=r"frames: uint8 \[8, 8, 3\] given"):
        session.feed(np.zeros((2, 8, 8, 3), np.uint8))
    fed = 0
    until = time.monotonic() + PATIENCE
    while not any(event.get("video") for event in session.log()["events"]) and time.monotonic() < until:
        session.feed(video[fed % 60 :][:2])
        fed += 2
        take(session, 8)
    assert any(event.get("video") for event in session.log()["events"]), "the camera's frames have entered"
    session.strength = 0.2
    assert session.strength == 0.2
    take(session, 24)
    session.close()

    def broken():
        yield from video[:40]
        raise ConfigError("video: breaks off")

    session, other = engine.open("a red car", video=broken()), engine.open("a bus")
    with pytest.raises(ConfigError, match="breaks off"):
        take(session, 400)
    assert session.closed
    take(other, 16)
    other.close()
    reading = engine.open("a red car", video=itertools.repeat(video[0]))
    with pytest.raises(ConfigError, match="reads a video already"):
        reading.feed(video[:1])
    reading.close()


def test_impossible_requests_change_nothing(engine):
    session = engine.open("a red car")
    for attempt in (
        lambda: session.change("x" * 10_000),
        lambda: session.change("a bus", over=-1),
        lambda: setattr(session, "guidance", float("nan")),
        lambda: setattr(session, "strength", 2),
        lambda: engine.open("x" * 10_000),
        lambda: engine.open("a car", seed=2**40),
        lambda: engine.open("a car", image=np.zeros((4, 4, 3), np.uint8)),
        lambda: engine.open("a car", video=3),
    ):
        with pytest.raises(StreamDiTError):
            attempt()
    assert session.prompt == "a red car" and engine.free_slots == 3 and session.log()["events"] == []
    take(session, 8)
    session.close()


def test_stats(engine):
    session = engine.open("a red car")
    take(session, 40)
    stats = engine.stats()
    assert stats["sessions"] == 1 and stats["slots"] == 4 and stats["free_slots"] == 3
    assert 0 < stats["forward_ms_median"] <= stats["forward_ms_p99"] and stats["decode_ms_median"] > 0
    session.close()


@pytest.mark.parametrize("part, thread", [("batches.step", "denoiser"), ("batches.decode", "decoder")])
def test_an_error_in_a_thread_surfaces_in_every_caller(pipeline, part, thread):
    engine = Engine(pipeline, slots=2).start()
    one, two = engine.open("a red car"), engine.open("a bus")
    take(one, 8)
    owner, name = part.split(".")

    def broken(*_):
        raise FloatingPointError("the device is gone")

    setattr(getattr(engine, owner), name, broken)
    callers = (
        lambda: take(one, 100_000),
        lambda: next(two),
        lambda: one.change("a bus"),
        lambda: two.snapshot(),
        lambda: engine.open("a car"),
        lambda: setattr(one, "guidance", 1.0),
    )
    for call in callers:
        with pytest.raises(
            EngineStopped, match=f"the {thread} failed: FloatingPointError: the device is gone"
        ) as error:
            call()
        assert isinstance(error.value.__cause__, FloatingPointError)
    engine.close()
    assert not any(one.is_alive() for one in engine._threads)


def test_closing_ends_threads_readers_and_waiters(pipeline):
    before = set(threading.enumerate())
    engine = Engine(pipeline, slots=2)
    with pytest.raises(SessionClosed, match="not started"):
        engine.open("a car")
    with engine:
        session = engine.open("a red car", video=np.zeros((200, 16, 16, 3), np.uint8))
        session.pause()
        ended = []
        reader = threading.Thread(target=lambda: ended.append(list(session)))
        reader.start()
        time.sleep(0.2)
        began = time.monotonic()
    assert time.monotonic() - began < 30
    reader.join(PATIENCE)
    assert not reader.is_alive() and ended and session.closed
    for call in (lambda: session.get(timeout=1), lambda: engine.open("a car"), lambda: session.change("a bus")):
        with pytest.raises(SessionClosed):
            call()
    engine.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(PATIENCE)
    assert set(threading.enumerate()) <= before


def test_a_forward_sent_ahead_changes_nothing(pipeline, monkeypatch):
    """As on accelerators, where the next forward is dispatched while one is under way."""
    monkeypatch.setattr(live_engine, "AHEAD", {})
    with Engine(pipeline, slots=1) as engine:
        session = engine.open("a red car", seed=4)
        start, _ = take(session, 24)
        snapshot = session.snapshot()
        rest, _ = take(session, 24)
        assert engine.stats()["forward_ms_median"] > 0
    assert np.array_equal(np.concatenate([start, rest]), alone(pipeline.stream("a red car", seed=4), 48))
    first = 8 * ((snapshot.facts["log"]["steps"] - 6) // 2)
    resumed = alone(pipeline.resume(snapshot), 8)
    assert np.array_equal(resumed, alone(pipeline.stream("a red car", seed=4), first + 8)[first:])


def test_engines_that_cannot_be(pipeline):
    for options, message in (
        ({"slots": 0}, "slots: "),
        ({"queue_chunks": 1.5}, "queue_chunks: "),
        ({"scheme": "N4c1s1"}, "scheme: N4c1s1 has 4 frames"),
        ({"filling": "magic"}, "filling: "),
        ({"filling": "ramp", "refill": "1:0.75"}, "refill: "),
        ({"filling": "doubling", "refill": "1", "per_chunk_prompts": True}, "refill: "),
    ):
        with pytest.raises(ConfigError, match=message):
            Engine(pipeline, **options)


@pytest.mark.parametrize(
    "how",
    [
        {"scheme": "K2N3c2s2", "per_chunk_prompts": True},
        {"filling": "ramp"},
        {"filling": "doubling", "refill": "1:0.75"},
    ],
)
def test_every_kind_of_stream_goes_live(pipeline, how):
    image = np.full((16, 16, 3), 80, np.uint8)
    with Engine(pipeline, slots=2, **how) as engine:
        one, two = engine.open("a red car", seed=1), engine.open("a bus", seed=2, image=image)
        start = take(one, 16)[0]
        receipt = one.change("a blue bus at night")
        frames = take(two, 40)[0]
        rest = take(one, receipt.complete_frame)[0]
        log = one.log()
    same(frames, alone(pipeline.stream("a bus", seed=2, image=image, **how), 40))
    same(np.concatenate([start, rest]), alone(pipeline.replay(log), 16 + len(rest)))
