"""Served from the real engine: a tiny model of random weights, and `streamdit serve` as a user starts it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from websockets.sync.client import connect

import streamdit_jax as sd
from streamdit_jax.data import captions
from streamdit_jax.errors import ConfigError
from streamdit_jax.live import Engine
from streamdit_jax.serving.command import EXAMPLES, bind, check_address
from streamdit_jax.serving.protocol import STILL, Kind
from streamdit_jax.serving.video import decode_jpeg
from streamdit_jax.snapshot import Snapshot

PROMPT = "a red car"


@pytest.fixture(scope="module")
def pipeline(tiny_model):
    return sd.load(tiny_model)


@pytest.fixture(scope="module")
def engine(pipeline):
    with Engine(pipeline, slots=2, queue_chunks=1) as engine:
        yield engine


def pictures(client, count):
    """Frames as the viewer sees them: uint8 [count, 16, 16, 3]."""
    return np.stack([decode_jpeg(client.picture(timeout=120).payload, 16, 16) for _ in range(count)])


def test_a_viewer_sees_the_frames_of_the_stream_and_its_prompt_when_the_receipt_says(serve, engine, pipeline):
    with serve(engine=engine, size=16).client() as client:
        client.say("start", prompt=PROMPT, seed=3)
        seen = pictures(client, 16).astype(int)
        stream = pipeline.stream(PROMPT, seed=3)
        made = np.concatenate([next(stream) for _ in range(4)])[:16].astype(int)
        assert np.abs(seen - made).mean() < 6, "as JPEG shows them"
        client.say("prompt", prompt="a blue bus", over=2, id=1)
        receipt = client.event("receipt", timeout=120)
        assert 0 < receipt["first_frame"] < receipt["complete_frame"] and receipt["step"] > 0
        client.until(lambda m: not isinstance(m, dict) and m.frame >= receipt["complete_frame"], 120)
        stats = client.event("stats")["engine"]
        assert stats["forward_ms_median"] > 0 and stats["decode_ms_median"] > 0
        client.say("prompt", prompt="x" * 500)
        assert "500 bytes" in client.event("error")["message"]
        client.picture()


def test_a_snapshot_goes_on_and_a_forged_one_hurts_nobody(serve, engine, tmp_path):
    running = serve(engine=engine, size=16)
    with running.client() as client:
        client.say("start", prompt=PROMPT, seed=4)
        pictures(client, 4)
        client.say("snapshot")
        saved = client.binary(Kind.SNAPSHOT).payload
        path = tmp_path / "s.snap"
        path.write_bytes(saved)
        honest = Snapshot.load(path)
        client.upload(Kind.SNAPSHOT, saved)
        client.say("start", source="snapshot", id=2)
        assert client.event("started", timeout=120)["prompt"] == PROMPT
        pictures(client, 8)
        forgeries = [{**honest.arrays, name: array[..., :1]} for name, array in honest.arrays.items() if array.ndim]
        forgeries.append({name: array for name, array in honest.arrays.items() if name != "buffer"})
        for arrays in forgeries[::3]:
            Snapshot(honest.facts, arrays).save(path)
            client.upload(Kind.SNAPSHOT, path.read_bytes())
            time.sleep(0.3)  # within what may be asked for in a second
            client.say("start", source="snapshot", id=3)
            error = client.event("error", "started")
            assert error["type"] == "error" and error["code"] == "refused", error
        client.say("start", prompt=PROMPT)
        pictures(client, 4)
    assert not engine.failed and running.eventually(lambda: engine.free_slots == 2)


def test_a_camera_and_an_image_enter_the_stream(serve, engine):
    with serve(engine=engine, size=16).client() as client:
        client.say("start", prompt=PROMPT, source="camera", strength=0.2)
        for shade in range(0, 240, 4):
            client.upload(Kind.RGB, bytes([shade]) * (16 * 16 * 3))
        pictures(client, 24)
        client.upload(Kind.RGB, bytes(16 * 16 * 3), STILL)
        client.say("start", prompt=PROMPT, source="image")
        client.until(lambda m: not isinstance(m, dict) and m.video == 2, 120)
        client.say("set", strength=0.9, guidance=1.5, id=5)
        client.event("done")
        client.picture()
    assert not engine.failed


def test_addresses_beyond_this_machine_need_a_token():
    assert check_address("127.0.0.1", None) and check_address("localhost", None) and check_address("::1", None)
    assert not check_address("0.0.0.0", "correct horse") and check_address("127.0.0.1", "correct horse")
    for arguments, complaint in (
        (("0.0.0.0", None), "--token"),
        (("", None), "--token"),
        (("0.0.0.0", "short"), "at least 8"),
        (("127.0.0.1", None, ["example.org"]), "--origin"),
        (("127.0.0.1", None, ["https://example.org/page"]), "--origin"),
        (("no such host.", "correct horse"), "--host"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            check_address(*arguments)
    with bind("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="cannot be bound"):
        bind("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ConfigError, match="--port"):
        bind("127.0.0.1", 70000)


def words(table):
    """All words within tables of captions."""
    if isinstance(table, str):
        return set(table.split())
    inner = [*table.keys(), *table.values()] if isinstance(table, dict) else table
    return set().union(*map(words, inner)) if isinstance(inner, list | tuple) else set()


def test_examples_speak_the_language_of_the_world():
    known = {"a"}.union(*(words(table) for name, table in vars(captions).items() if name.isupper()))
    for example in EXAMPLES:
        assert words(example) <= known and len(example) <= captions.MAX_BYTES


def streamdit(*arguments, **options):
    # A job that a script runs in the background is born deaf to Ctrl-C, and so are its children.
    hearing = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [sys.executable, "-c", hearing + "from streamdit_jax.cli import main; sys.exit(main())", "serve"]
    command += map(str, arguments)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(sd.__file__).parents[1])}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


@contextlib.contextmanager
def watched(process):
    """Kills what a failed test would leave behind."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_mistakes_end_in_one_line_before_anything_is_loaded():
    for arguments, complaint in (
        (["--host=0.0.0.0"], "--token (or STREAMDIT_TOKEN) is required"),
        (["--max-sessions=0"], "--max-sessions"),
        (["--idle-seconds=nan"], "--idle-seconds"),
        (["--model=nowhere"], "nowhere"),
    ):
        with watched(streamdit("--port=0", *arguments)) as process:
            said, error = process.communicate(timeout=60)
        assert process.returncode == 2 and complaint in error and not said
        assert error.count("\n") == 1 or "compiling" in error, error


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_and_stops(tiny_model, stop):
    with watched(streamdit(f"--model={tiny_model}", "--port=0", "--max-sessions=1")) as process:
        address = process.stdout.readline().split()[0]
        assert address.startswith("http://127.0.0.1:")
        how = {"proxy": None, "compression": None, "close_timeout": 1}
        with connect(address.replace("http", "ws") + "live", **how) as viewer:
            viewer.send('{"type": "hello"}')
            viewer.send('{"type": "start", "prompt": "a red car"}')
            assert any(isinstance(viewer.recv(120), bytes) for _ in range(20))
            began = time.monotonic()
            process.send_signal(stop)
            process.wait(20)
            assert time.monotonic() - began < 15
        _, error = process.communicate()
        assert "Traceback" not in error, error
        assert process.returncode == (130 if stop is signal.SIGINT else -signal.SIGTERM)
        port = int(address.rsplit(":", 1)[1].strip("/"))
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), 2).close()
