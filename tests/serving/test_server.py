"""The server as programs see it: one websocket a viewer, over 127.0.0.1."""

import contextlib
import io
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from streamdit_jax.errors import StreamDiTError
from streamdit_jax.serving.protocol import STILL, Kind, Limits, messages
from streamdit_jax.serving.video import JPEGEncoder, decode_jpeg
from streamdit_jax.serving.viewer import IDLE, MALFORMED, SLOW, UNWELCOME

DAY, NIGHT = "a red car by day", "a red car at night"
FAST = {"frame_rate": 200.0}
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # whatever proxy the environment names


def pictures(client, count, **options):
    return [client.picture(**options) for _ in range(count)]


def mean(picture, size=64):
    return decode_jpeg(picture.payload, size, size).mean()


def closed(client, seconds=10.0):
    """Reads until the server hangs up; the close code and reason."""
    until = time.monotonic() + seconds
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            client.next(until - time.monotonic())
    return caught.value.rcvd.code, caught.value.rcvd.reason


def test_frames_come_in_order_and_are_the_engines(serve):
    running = serve(**FAST, examples=["a red car"])
    with running.client(codecs=["jpeg"]) as client:
        welcome = client.welcome
        assert (welcome["width"], welcome["height"], welcome["codec"]) == (64, 64, "jpeg")
        assert welcome["examples"] == ["a red car"] and welcome["free"] == 4 and welcome["scheme"] == "N4c1s1"
        client.say("start", prompt=DAY, seed=7, id=1)
        started = client.event("started")
        assert (started["prompt"], started["seed"], started["id"], started["video"]) == (DAY, 7, 1, 1)
        for number, picture in enumerate(pictures(client, 20)):
            assert (picture.frame, picture.video, picture.kind) == (number, 1, Kind.JPEG)
            got = decode_jpeg(picture.payload, 64, 64).astype(int)
            assert np.abs(got - running.engine.draw(DAY, 7, number)).mean() < 4
        chunk = client.event("chunk")
        assert chunk["frames"] == 4 and chunk["first_frame"] % 4 == 0 and chunk["seconds"] >= 0
        stats = client.event("stats")
        assert stats["engine"]["frames_per_second"] is None, "JSON knows no NaN"
        assert stats["watching"] == 1 and stats["free"] == 3


def test_h264_is_decoded_by_what_it_says_it_is(serve):
    with serve(**FAST).client(codecs=["h264", "jpeg"]) as client:
        assert client.welcome["codec"] == "h264" and client.welcome["codec_string"].startswith("avc1.42c0")
        client.say("start", prompt=DAY)
        got = pictures(client, 12)
        assert got[0].flags == 1 and not any(picture.flags for picture in got[1:])
        client.say("keyframe")
        assert any(picture.flags for picture in pictures(client, 40)), "a key frame on demand"
        decoder = av.CodecContext.create("h264", "r")
        frames = [frame for picture in got for frame in decoder.decode(av.Packet(picture.payload))]
        frames += decoder.decode(None)
        assert len(frames) == 12
        sky = frames[5].reformat(format="rgb24").to_ndarray()[:20].mean((0, 1))
        np.testing.assert_allclose(sky, (130, 190, 240), atol=4)


def test_a_prompt_reaches_the_picture_when_its_receipt_says_so(serve):
    with serve(**FAST).client() as client:
        client.say("start", prompt=DAY)
        assert mean(client.picture()) > 100
        client.say("prompt", prompt=NIGHT, over=3, id=9)
        receipt = client.event("receipt")
        assert (receipt["id"], receipt["over"], receipt["prompt"]) == (9, 3, NIGHT)
        assert receipt["complete_frame"] == receipt["first_frame"] + 20
        reached = client.until(lambda m: not isinstance(m, dict) and m.frame >= receipt["first_frame"])
        assert mean(reached) < 80


def test_two_viewers_watch_different_videos(serve):
    running = serve(**FAST)
    with running.client() as one, running.client() as two:
        one.say("start", prompt=DAY)
        two.say("start", prompt=NIGHT)
        assert min(mean(picture) for picture in pictures(one, 10)) > 100
        assert max(mean(picture) for picture in pictures(two, 10)) < 80
        two.say("prompt", prompt=DAY)
        frame = two.event("receipt")["first_frame"]
        assert mean(two.until(lambda m: not isinstance(m, dict) and m.frame >= frame)) > 100
        one.say("stop")
        assert running.eventually(lambda: running.engine.free_slots == 3)
        assert mean(two.picture()) > 100, "one who stops does not stop the other"


def test_pause_stands_still_and_restart_begins_a_new_video(serve):
    with serve(**FAST).client() as client:
        client.say("start", prompt=DAY)
        last = client.picture().frame
        client.say("pause")
        while True:  # what was on its way
            try:
                last = client.picture(timeout=1.5).frame
            except TimeoutError:
                break
        client.say("resume", id=2)
        assert client.picture().frame == last + 1
        client.say("start", prompt=NIGHT, seed=3)
        client.until(lambda m: isinstance(m, dict) and m["type"] == "started")
        picture = client.picture()
        assert (picture.video, picture.frame) == (2, 0) and mean(picture) < 80


def test_guidance_and_strength_change_while_it_runs(serve):
    running = serve()
    with running.client() as client:
        client.say("start", prompt=DAY, guidance=2, strength=0.25)
        client.event("started")
        session = running.engine.sessions[0]
        assert (session.guidance, session.strength) == (2.0, 0.25)
        client.say("set", strength=0.75, id=1)
        client.event("done")
        assert (session.guidance, session.strength) == (2.0, 0.75)


def test_a_snapshot_is_saved_resumed_and_forked(serve):
    running = serve(**FAST)
    with running.client() as client:
        client.say("start", prompt=DAY, seed=5)
        client.picture()
        client.say("snapshot")
        saved = client.binary(Kind.SNAPSHOT).payload
    with running.client() as client:
        client.upload(Kind.SNAPSHOT, saved)
        client.say("start", source="snapshot")
        started = client.event("started")
        assert started["prompt"] == DAY
        session = running.engine.sessions[-1]
        assert session.seed == 5 and client.picture().frame > 0
        client.upload(Kind.SNAPSHOT, saved)
        client.say("start", source="snapshot", prompt=NIGHT)
        assert client.event("started")["prompt"] == NIGHT
        assert mean(client.until(lambda m: not isinstance(m, dict) and m.video == 2)) < 80
        client.upload(Kind.SNAPSHOT, saved[:-20] + bytes(20))
        assert client.event("error")["code"] == "refused"
        client.upload(Kind.SNAPSHOT, b"\x80\x04\x95pickle")
        error = client.event("error")
        assert "snapshot: is damaged or no snapshot" in error["message"] and "/tmp" not in error["message"]
        client.say("start", prompt=DAY, source="image")
        assert "source image needs one" in client.event("error")["message"]


def test_camera_and_image_reach_the_engine_at_its_size(serve):
    running = serve(**FAST)
    green = np.full((64, 64, 3), (10, 200, 30), np.uint8)
    with running.client() as client:
        client.upload(Kind.RGB, green.tobytes(), STILL)
        client.say("start", prompt=DAY, source="image")
        client.event("started")
        assert np.abs(decode_jpeg(client.picture().payload, 64, 64).mean((0, 1)) - (10, 200, 30)).max() < 4
        client.say("start", prompt=DAY, source="camera")
        client.event("started")
        client.upload(Kind.RGB, bytes(64 * 64 * 3))
        assert mean(client.until(lambda m: not isinstance(m, dict) and mean(m) < 5)) < 5
        client.upload(Kind.JPEG, JPEGEncoder(64, 64, 16.0).encode(green).data)
        client.until(lambda m: not isinstance(m, dict) and mean(m) > 60)
        for wrong in (bytes(64 * 64 * 3 - 1), bytes(10)):
            client.upload(Kind.RGB, wrong)
            assert "64×64 in RGB has 12288" in client.event("error")["message"]
        client.upload(Kind.JPEG, JPEGEncoder(32, 64, 16.0).encode(green[:32]).data)
        assert "no JPEG of 64×64" in client.event("error")["message"]
        client.picture()


@pytest.mark.parametrize("codec", ["h264", "jpeg"])
def test_the_last_minute_comes_as_a_file_and_no_more_than_that(serve, codec):
    running = serve(limits=Limits(recent_seconds=3), frame_rate=100.0)
    with running.client(codecs=[codec]) as client:
        client.say("download")
        assert "no picture yet" in client.event("error")["message"]
        client.say("start", prompt=DAY)
        client.until(lambda m: not isinstance(m, dict) and m.frame >= 350, timeout=30)
        client.say("download")
        with av.open(io.BytesIO(client.binary(Kind.MP4).payload)) as container:
            assert container.streams.video[0].codec_context.name == "h264"
            frames = len(list(container.decode(video=0)))
        # H.264 begins at a key frame, of which there is one every two seconds.
        assert frames == 300 if codec == "jpeg" else 100 <= frames <= 300


def test_acknowledged_frames_pace_the_stream(serve):
    running = serve(frame_rate=1000.0, chunk=4)
    with running.client(acknowledges=True) as client:
        ahead = client.welcome["ahead"]
        client.say("start", prompt=DAY)
        sent = 0
        try:
            while True:
                sent = client.picture(timeout=1.5).frame
        except TimeoutError:
            pass
        assert ahead <= sent <= ahead + 4, "it waits for the viewer"
        client.say("shown", video=1, frame=sent)
        assert client.picture().frame == sent + 1
        client.say("shown", video=9, frame=10**6)
        client.say("shown", video=1, frame=10**6)
        pictures(client, ahead - 1)
        with pytest.raises(TimeoutError):
            while client.picture(timeout=1.5).frame <= sent + 2 * ahead + 8:
                pass


def test_without_acknowledgements_the_clock_paces(serve):
    with serve(frame_rate=100.0).client() as client:
        client.say("start", prompt=DAY)
        client.picture()
        began = time.monotonic()
        pictures(client, 150)
        assert 0.9 <= time.monotonic() - began <= 10.0


# Mistakes and limits


def test_each_mistake_is_one_error_and_the_session_goes_on(serve):
    with serve(**FAST).client() as client:
        client.say("prompt", prompt=NIGHT, id=4)
        error = client.event("error")
        assert (error["code"], error["id"]) == ("refused", 4) and "send start first" in error["message"]
        client.say("start", prompt=DAY)
        client.event("started")
        for wrong in (
            "{",
            "[]",
            '{"type": "prompt"}',
            b"",
            b"\xff" * 9,
            b"\x04" + bytes(20),
            '{"type": "hello"}',
            "é" * 9,
        ):
            client.socket.send(wrong)
            assert client.event("error", timeout=5)["code"] == "malformed"
        client.say("prompt", prompt="x" * 5000)
        assert "at most 1000 bytes" in client.event("error")["message"]
        client.socket.send('"' + "x" * 100_000 + '"')
        assert "at most 16384 bytes" in client.event("error")["message"]
        assert mean(client.picture()) > 100


def test_what_the_engine_refuses_is_said_and_what_fails_is_not_told_apart(serve, caplog):
    running = serve(**FAST)
    with running.client() as client:
        client.say("start", prompt=DAY)
        client.event("started")
        session = running.engine.sessions[0]
        session.change = lambda prompt, over: (_ for _ in ()).throw(
            StreamDiTError("prompt: 200 bytes, but at most 110")
        )
        client.say("prompt", prompt=NIGHT, id=1)
        assert client.event("error")["message"] == "prompt: 200 bytes, but at most 110"
        session.snapshot = lambda: 1 / 0
        client.say("snapshot")
        error = client.event("error")
        assert error["code"] == "failed" and "division" not in error["message"] and "ZeroDivision" in caplog.text
        session.failure = RuntimeError("secret of the machine room")
        ended = client.event("ended")
        assert "secret" not in ended["reason"] and running.eventually(lambda: running.engine.free_slots == 4)
        client.say("start", prompt=NIGHT)
        assert mean(client.picture()) < 80, "a new session is possible at once"


@pytest.mark.slow
def test_ten_thousand_malformed_messages_leave_the_server_serving(serve):
    running = serve(**FAST)
    rng = np.random.default_rng(0)
    texts = [
        "",
        "{",
        "null",
        '{"type": 3}',
        '{"type": "prompt", "prompt": []}',
        "[" * 3000,
        '{"type": "start"}',
        "x" * 20000,
    ]
    sent = 0
    with running.client() as steady:
        steady.say("start", prompt=DAY)
        while sent < 10_000:
            with running.client() as client:
                try:
                    for _ in range(100):
                        kind = rng.integers(2)
                        client.socket.send(rng.bytes(rng.integers(1, 200)) if kind else texts[rng.integers(len(texts))])
                        sent += 1
                    code, _ = closed(client)
                except ConnectionClosed as gone:
                    code = gone.rcvd.code if gone.rcvd else 4400
                assert code == 4400, "too many: the connection is closed, in so many words"
        before = steady.picture().frame
        assert steady.until(lambda m: not isinstance(m, dict) and m.frame > before + 8)
    with running.client() as client:
        client.say("start", prompt=NIGHT)
        assert mean(client.picture()) < 80
    assert running.eventually(lambda: running.service.connections == 0 and running.engine.free_slots == 4)


def test_more_messages_than_the_rate_are_dropped_and_then_the_viewer_is(serve):
    limits = Limits(messages_per_second=20, offences_per_minute=5)
    with serve(limits=limits, frame_rate=10.0).client() as client:
        with contextlib.suppress(ConnectionClosed):  # the server may hang up before the last of them
            for _ in range(400):
                client.say("alive")
        assert "more than 40 messages per second" in client.event("error")["message"]
        assert closed(client) == (4400, "too many malformed messages")


def test_seats_are_bounded_and_come_back(serve):
    running = serve(slots=2, **FAST)
    with running.client() as one, running.client() as two, running.client() as three:
        for client in (one, two):
            client.say("start", prompt=DAY)
            client.picture()
        three.say("start", prompt=DAY, id=1)
        error = three.event("error")
        assert error["code"] == "full" and "all 2 places are taken" in error["message"]
        one.say("start", prompt=NIGHT)
        one.event("started")
        assert one.picture().video == 2, "a restart keeps its place"
        two.socket.close()
        assert running.eventually(lambda: running.engine.free_slots == 1), "a closed tab frees its slot"
        assert running.eventually(lambda: running.service.free_seats == 1), "and then its seat"
        three.say("start", prompt=DAY)
        assert three.event("started")


def test_connections_without_a_seat_are_bounded_too(serve):
    running = serve(limits=Limits(sessions=1, waiting=1))
    with running.client(), running.client():
        with pytest.raises(InvalidStatus) as refused, running.connect():
            pass
        assert refused.value.response.status_code == 503
    assert running.eventually(lambda: running.service.connections == 0)
    with running.client():
        pass


def test_a_viewer_without_a_sign_of_life_is_let_go(serve):
    running = serve(**FAST, limits=Limits(sessions=1, idle_seconds=0.6))
    with running.client() as client:
        client.say("start", prompt=DAY)
        for _ in range(6):
            time.sleep(0.2)
            client.say("alive")
        client.say("prompt", prompt=NIGHT)
        client.event("receipt")
        code, reason = closed(client)
        assert code == 4408 and "no sign of you" in reason
    assert running.eventually(lambda: running.engine.free_slots == running.engine.slots)


@pytest.mark.parametrize("first", [None, '{"type": "start", "prompt": "a"}', b"\x01" * 20, "{"])
def test_whoever_does_not_greet_is_not_served(serve, first):
    running = serve(limits=Limits(hello_seconds=0.3))
    with running.connect() as socket, pytest.raises(ConnectionClosed) as caught:
        if first is not None:
            socket.send(first)
        while True:
            socket.recv(5)
    assert caught.value.rcvd.code == 4400


def test_a_slow_reader_is_dropped_and_nobody_else_waits(serve):
    # 256×256 noise at 100 frames per second: what lies in the kernel's buffers is soon full.
    running = serve(slots=2, size=256, frame_rate=100.0, limits=Limits(sessions=2, stall_seconds=1.0))
    engine = running.engine
    noise = np.random.default_rng(0).integers(0, 255, (256, 256, 3), np.uint8)
    narrow = socket.socket()
    narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    narrow.connect(("127.0.0.1", running.port))
    with running.connect(sock=narrow, max_queue=1) as stuck, running.client() as steady:
        stuck.send('{"type": "hello"}')
        stuck.send(bytes([Kind.RGB, STILL]) + bytes(6) + noise.tobytes())
        stuck.send('{"type": "start", "prompt": "a", "source": "image"}')  # and nothing is read from here on
        steady.say("start", prompt=DAY)
        steady.picture()
        gaps, last, until = [], time.monotonic(), time.monotonic() + 20
        while engine.free_slots < 1 and time.monotonic() < until:
            steady.picture()
            gaps.append(time.monotonic() - last)
            last = time.monotonic()
        assert engine.free_slots == 1, "the slow reader's slot is free again"
        assert max(gaps) < 1.0 and len(gaps) > 20, "the other's pictures went on"
        steady.picture()
        assert running.eventually(lambda: len(running.server.server_state.connections) == 1, 10), "nor its socket stays"
        narrow.shutdown(socket.SHUT_RDWR)


def test_a_viewer_who_shows_nothing_is_dropped_unless_it_paused(serve):
    running = serve(**FAST, limits=Limits(stall_seconds=0.8))
    with running.client(acknowledges=True) as client:
        client.say("start", prompt=DAY)
        client.picture()
        client.say("pause", id=1)
        client.event("done")
        time.sleep(1.2)
        client.say("resume", id=2)
        client.event("done")
        code, reason = closed(client)
        assert code == 4409 and "nothing was shown" in reason


# Who may connect


def test_only_our_own_page_and_named_origins_may_connect(serve):
    running = serve(origins=("https://example.org",))
    own = f"http://127.0.0.1:{running.port}"
    for origin in (None, own, "https://example.org"):
        with running.client(origin=origin):
            pass
    for origin in ("http://evil.example", "null", f"http://localhost:{running.port}", "http://127.0.0.1:1"):
        with pytest.raises(InvalidStatus) as refused, running.connect(origin=origin):
            pass
        assert refused.value.response.status_code == 403, origin


def test_a_name_that_is_not_ours_is_refused_even_if_it_leads_here(serve):
    """DNS rebinding: a page of evil.example whose name is made to point to 127.0.0.1 has a matching Origin and Host."""
    running = serve()
    name = f"evil.example:{running.port}"
    request = urllib.request.Request(running.http, headers={"Host": name})
    with pytest.raises(urllib.error.HTTPError) as refused:
        OPENER.open(request, timeout=5)
    assert refused.value.code == 403
    direct = socket.create_connection(("127.0.0.1", running.port))
    with pytest.raises(InvalidStatus) as refused, direct:
        connect(f"ws://{name}/live", sock=direct, origin=f"http://{name}").close()
    assert refused.value.response.status_code == 403


def test_a_token_is_asked_for(serve):
    running = serve(token="correct horse", hosts=None)
    for wrong in ({}, {"token": "wrong"}, {"token": "correct horse "}):
        with running.connect() as socket, pytest.raises(ConnectionClosed) as caught:
            socket.send(json.dumps({"type": "hello", **wrong}))
            socket.recv(5)
        assert caught.value.rcvd.code == 4401
    with running.client(token="correct horse") as client:
        assert client.welcome["type"] == "welcome" and "correct" not in json.dumps(client.welcome)


def test_the_page_is_one_piece_and_may_load_nothing_else(serve):
    running = serve(origins=("https://example.org",))
    with OPENER.open(running.http, timeout=5) as response:
        body, headers = response.read().decode(), response.headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe" not in policy
    assert "frame-ancestors 'self' https://example.org" in policy
    assert "class StreamDiTPlayer" in body and "--accent" in body and "<script></script>" not in body
    assert not [word for word in ('src="http', 'href="http', "@import", "cdn") if word in body]
    with pytest.raises(urllib.error.HTTPError) as missing:
        OPENER.open(running.http + "page.js", timeout=5)
    assert missing.value.code == 404


def test_it_stops_while_viewers_watch(serve):
    running = serve(**FAST)
    with running.client() as client, running.client(acknowledges=True) as stuck:
        client.say("start", prompt=DAY)
        stuck.say("start", prompt=DAY)
        client.picture()
        began = time.monotonic()
        running.server.should_exit = True
        assert closed(client)[0] == 1012
        assert running.eventually(lambda: running.engine.free_slots == 4) and time.monotonic() - began < 6


def test_it_stops_where_the_engine_failed(serve):
    running = serve()
    with running.client() as client:
        running.engine.failed = True
        assert closed(client)[0] == 1012


@pytest.mark.slow
def test_memory_stays_flat_over_five_thousand_chunks(serve):
    """Two viewers, one acknowledging and one not, 2,500 chunks each; what is remembered was full long before."""
    resource = pytest.importorskip("resource", reason="the resident size is read as Unix gives it")
    running = serve(frame_rate=1000.0, chunk=4, limits=Limits(recent_seconds=1.0, messages_per_second=1e6))
    resident = []

    def watch(acknowledges, codec):
        with running.client(acknowledges=acknowledges, codecs=[codec]) as client:
            client.say("start", prompt=DAY)
            while (frame := client.picture(timeout=30).frame) < 10_000:
                if acknowledges and frame % 4 == 3:
                    client.say("shown", video=1, frame=frame)
                if frame % 1000 == 999:
                    client.say("alive")
                    resident.append((frame, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))

    threads = [threading.Thread(target=watch, args=how) for how in ((True, "h264"), (False, "jpeg"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    early = max(size for frame, size in resident if frame <= 2999)
    late = max(size for frame, size in resident)
    assert len(resident) == 20 and late - early < 4 * 1024, f"grew by {(late - early) / 1024:.1f} MiB"


def code(language):
    """The blocks of docs/live.md in a language."""
    text = (Path(__file__).parents[2] / "docs" / "live.md").read_text(encoding="utf-8")
    return [block.split("```")[0] for block in text.split(f"```{language}\n")[1:]]


def test_the_viewer_of_the_guide_writes_a_video_to_its_standard_output(serve):
    running = serve(frame_rate=200.0)
    (program,) = [block for block in code("python") if "ws://" in block]
    program = program.replace("127.0.0.1:8000", f"127.0.0.1:{running.port}").replace("max_size=None", "proxy=None")
    made = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=True).stdout
    with av.open(io.BytesIO(made), format="h264") as container:
        assert len(list(container.decode(video=0))) == 160


def test_the_guide_tells_the_protocol_as_it_is(serve):
    guide = (Path(__file__).parents[2] / "docs" / "live.md").read_text(encoding="utf-8")
    for message, fields in messages(Limits()).items():
        rows = [line for line in guide.splitlines() if line.startswith("| `") and f"`{message}`" in line.split("|")[1]]
        row = rows[0] if rows else ""
        assert row and all(f"`{field}`" in row for field in fields), message
    for kind in Kind:
        assert f"{kind.value} {'snapshot' if kind is Kind.SNAPSHOT else kind.name.replace('H264', 'H.264')}" in guide
    for code in (MALFORMED, UNWELCOME, IDLE, SLOW):
        assert str(code) in guide
