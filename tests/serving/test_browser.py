"""The page in a real browser: Chromium without a window, driven over its DevTools protocol, one websocket."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from websockets.sync.client import connect

import streamdit_jax as sd
from streamdit_jax.live import Engine
from streamdit_jax.machine import hardware, versions
from streamdit_jax.serving.command import EXAMPLES

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, and these tests drive one"),
]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-default-browser-check"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--mute-audio", "--remote-debugging-port=0"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"),
]
DAY, NIGHT = "a red car on a sunny day", "a red car at night"


class Browser:
    """A Chromium with a profile of its own, gone when the block ends."""

    def __init__(self, profile: Path):
        self.profile, self.numbers, self.tabs = profile, itertools.count(1), {}

    def __enter__(self):
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        home = {"HOME": str(self.profile), "XDG_CONFIG_HOME": str(self.profile), "XDG_CACHE_HOME": str(self.profile)}
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **home}
        )
        port = self.profile / "DevToolsActivePort"
        until = time.monotonic() + 60
        while not (port.exists() and port.read_text().count("\n")) and time.monotonic() < until:
            time.sleep(0.05)
        number, path = port.read_text().split()
        self.socket = connect(f"ws://127.0.0.1:{number}{path}", max_size=None, compression=None, proxy=None)
        return self

    def __exit__(self, *_):
        try:
            self.call("Browser.close")
            self.socket.close()
        finally:
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def call(self, method, session=None, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params}
        self.socket.send(json.dumps(message if session is None else {**message, "sessionId": session}))
        until = time.monotonic() + 60
        while True:
            answer = json.loads(self.socket.recv(max(0.1, until - time.monotonic())))
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            if answer["method"] == "Runtime.exceptionThrown":
                self.tabs[answer["sessionId"]].mistakes.append(answer["params"]["exceptionDetails"])
            elif answer["method"] == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.tabs[answer["sessionId"]].mistakes.append(answer["params"]["entry"])

    def tab(self, url, width=1280, height=860, dark=False, scale=1):
        # A window of its own: a tab in the background draws nothing.
        target = self.call("Target.createTarget", url="about:blank", newWindow=True)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self.tabs[session] = Tab(self, target, session)
        for domain in ("Page", "Runtime", "Log"):
            tab.call(f"{domain}.enable")
        tab.call("Emulation.setFocusEmulationEnabled", enabled=True)
        tab.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        tab.call("Emulation.setEmulatedMedia", features=[theme])
        tab.call("Page.navigate", url=url)
        return tab


class Tab:
    """One page: `run` evaluates an expression in it, `wait` until one holds."""

    def __init__(self, browser, target, session):
        self.browser, self.target, self.session, self.mistakes = browser, target, session, []
        self.closed = False

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def run(self, expression):
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression, seconds=30.0):
        until = time.monotonic() + seconds
        while not (value := self.run(expression)):
            assert time.monotonic() < until, f"{expression}: not within {seconds} s; the page says: {self.text()}"
            time.sleep(0.05)
        return value

    def text(self):
        return self.run("document.body.innerText")

    def shown(self):
        """Number of the frame that is shown."""
        return self.run("typeof player === 'undefined' ? -1 : player.shown")

    def colours(self):
        """The canvas's mean over the upper half, RGB."""
        pixels = (
            "(() => { const c = document.getElementById('picture'); const d = c.getContext('2d')"
            ".getImageData(0, 0, c.width, c.height / 2).data; const s = [0, 0, 0];"
            "for (let i = 0; i < d.length; i += 4) for (let k = 0; k < 3; k++) s[k] += d[i + k];"
            "return s.map((v) => v / (d.length / 4)); })()"
        )
        return np.array(self.run(pixels))

    def steer(self, prompt):
        self.run(f"document.getElementById('prompt').value = {json.dumps(prompt)}; steer(); 0")

    def picture(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self.closed = True
        self.browser.call("Target.closeTarget", targetId=self.target)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@pytest.fixture
def open_page(browser, serve):
    """open_page(running, hash="", …) → Tab; closed, and checked for errors of script or policy, when the test ends."""
    tabs = []

    def start(running, fragment="", **options):
        tab = browser.tab(running.http + fragment, **options)
        tab.wait("typeof player !== 'undefined'")
        tabs.append(tab)
        return tab

    yield start
    for tab in tabs:
        if not tab.closed:
            mistakes = tab.mistakes
            tab.close()
            assert not mistakes


def test_frames_arrive_and_change_and_a_prompt_turns_day_into_night(serve, open_page):
    running = serve(frame_rate=16.0, chunk=8, examples=[DAY])
    tab = open_page(running)
    tab.wait("player.shown > 16")
    assert tab.run("player.welcome.codec") == "h264", "Chromium has WebCodecs on pages of this machine"
    np.testing.assert_allclose(tab.colours(), (130, 190, 240), atol=6)
    before = tab.run("document.getElementById('picture').toDataURL()")
    tab.wait(f"document.getElementById('picture').toDataURL() !== {json.dumps(before)}")
    tab.steer(NIGHT)
    tab.wait("document.getElementById('history').innerText.includes('complete after')")
    tab.wait("player.ready.size >= 0 && page.sent[0].over")
    np.testing.assert_allclose(tab.colours(), (14, 18, 46), atol=6)
    said = tab.text()
    assert "reached the picture after" in said and NIGHT in said and DAY in said
    assert 0 < tab.run("page.sent[0].reached") < 2500, "milliseconds, two chunks of half a second among them"
    tab.wait("Math.abs(Number(document.getElementById('fps').textContent) - 16) < 1.5")
    assert running.engine.sessions[0].frame - tab.shown() <= 8 + 2 * 8, "the server does not run ahead of the picture"


def test_a_browser_without_webcodecs_gets_jpeg(serve, open_page):
    tab = open_page(serve(frame_rate=16.0, examples=[DAY]), "#codec=jpeg")
    tab.wait("player.shown > 8")
    assert tab.run("player.welcome.codec") == "jpeg"
    np.testing.assert_allclose(tab.colours(), (130, 190, 240), atol=6)


def test_two_tabs_stream_different_prompts_and_a_closed_tab_frees_its_slot(serve, open_page):
    running = serve(slots=2, frame_rate=16.0, examples=[DAY])
    one, two = open_page(running, f"#prompt={DAY}"), open_page(running, f"#prompt={NIGHT}&seed=3")
    for tab in (one, two):
        tab.wait("player.shown > 8")
    np.testing.assert_allclose(one.colours(), (130, 190, 240), atol=6)
    np.testing.assert_allclose(two.colours(), (14, 18, 46), atol=6)
    assert running.engine.free_slots == 0 and {session.seed for session in running.engine.sessions} == {0, 3}
    three = open_page(running)
    three.wait("document.body.innerText.includes('All places are taken')")
    one.close()
    assert running.eventually(lambda: len(running.engine.sessions) == 1 or three.shown() > 0, 10)
    three.wait("player.shown > 8")
    frame = two.shown()
    two.wait(f"player.shown > {frame + 8}")


def test_the_knobs_do_what_they_say(serve, open_page, tmp_path):
    running = serve(frame_rate=16.0, examples=[DAY, NIGHT])
    tab = open_page(running)
    tab.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    tab.wait("player.shown > 8")
    session = running.engine.sessions[0]
    click = "document.getElementById('{}').click()".format
    # Pause: the picture stands still, and so does the engine.
    tab.run(click("pause"))
    assert running.eventually(lambda: session.paused)
    tab.run("new Promise((done) => setTimeout(done, 300))")
    shown = tab.shown()
    tab.run("new Promise((done) => setTimeout(done, 300))")
    assert tab.shown() == shown and tab.text().count("paused") == 1
    tab.run(click("pause"))
    tab.wait(f"player.shown > {shown + 4}")
    # Sliders.
    slide = (
        "(() => {{ const it = document.getElementById('{}'); it.value = {}; it.oninput(); it.onchange?.(); }})()".format
    )
    tab.run(slide("strength", 0.25))
    tab.run(slide("guidance", 2))
    assert running.eventually(lambda: (session.strength, session.guidance) == (0.25, 2.0))
    tab.run(slide("over", 4))
    assert "over 4 chunks" in tab.text()
    # An example, then the history.
    tab.run("document.querySelectorAll('.chips button')[1].click()")
    assert running.eventually(lambda: session.prompt == NIGHT)
    tab.wait("page.sent.length === 2")
    tab.run("document.querySelectorAll('#history button')[1].click()")
    assert running.eventually(lambda: session.prompt == DAY)
    # Seed and restart.
    tab.run("document.getElementById('seed').value = 42; document.getElementById('restart').requestSubmit()")
    assert running.eventually(lambda: session.closed and [one.seed for one in running.engine.sessions] == [42])
    tab.wait("player.video === 2 && player.shown > 4")
    # The last minute and a snapshot, as files.
    tab.run(click("download"))
    tab.run(click("snapshot"))
    assert running.eventually(lambda: {path.suffix for path in tmp_path.iterdir()} == {".mp4", ".snap"}, 20)
    saved = next(tmp_path.glob("*.snap"))
    upload = tab.call("Runtime.evaluate", expression="document.getElementById('resume')")["result"]["objectId"]
    tab.call("DOM.setFileInputFiles", files=[str(saved)], objectId=upload)
    tab.wait("player.video === 3 && player.shown > 4")
    assert running.engine.sessions[-1].seed == 42 and "resumed from a snapshot" in tab.text()


def test_camera_video_and_image_are_resized_in_the_browser(serve, open_page, tmp_path):
    running = serve(frame_rate=16.0, examples=[DAY])
    tab = open_page(running)
    tab.wait("player.shown > 4")
    tab.run("document.getElementById('camera').click()")
    assert running.eventually(lambda: running.engine.sessions and running.engine.sessions[-1].fed, 20)
    picture = running.engine.sessions[-1].fed[-1]
    assert picture.shape == (64, 64, 3) and np.ptp(picture) > 50, "Chromium's test picture"
    tab.run("document.getElementById('camera').click()")
    tab.wait("player.video === 3 && player.shown > 4")
    assert not running.engine.sessions[-1].fed
    image = tmp_path / "sign.png"
    tall = np.zeros((90, 30, 3), np.uint8)
    tall[30:60] = (200, 30, 40)  # what is left when it is cut at its centre
    save_png(image, tall)
    field = tab.call("Runtime.evaluate", expression="document.getElementById('image')")["result"]["objectId"]
    tab.call("DOM.setFileInputFiles", files=[str(image)], objectId=field)
    tab.wait("player.video === 4 && player.shown > 4")
    np.testing.assert_allclose(running.engine.sessions[-1].image.mean((0, 1)), (200, 30, 40), atol=3)
    np.testing.assert_allclose(tab.colours(), (200, 30, 40), atol=6)


def save_png(path, picture):
    import av

    context = av.CodecContext.create("png", "w")
    context.height, context.width, context.pix_fmt, context.time_base = *picture.shape[:2], "rgb24", Fraction(1)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
    path.write_bytes(b"".join(bytes(packet) for packet in (*context.encode(frame), *context.encode(None))))


def test_a_token_in_the_address_is_used_and_hidden(serve, open_page):
    running = serve(token="correct horse", frame_rate=16.0, examples=[DAY])
    tab = open_page(running)
    tab.wait("document.body.innerText.includes('asks for its token')")
    tab.run("document.getElementById('token').value = 'correct horse'")
    tab.run("document.getElementById('token-form').requestSubmit()")
    tab.wait("player.shown > 4")
    other = open_page(running, "#token=correct%20horse")
    other.wait("player.shown > 4")
    assert "horse" not in other.run("location.href")


def test_the_page_comes_back_when_the_server_does(serve, open_page):
    running = serve(frame_rate=16.0, examples=[DAY])
    tab = open_page(running)
    tab.wait("player.shown > 4")
    tab.run("player.socket.close()")
    tab.wait("document.body.innerText.includes('does not answer')")
    tab.wait("document.getElementById('status').textContent === 'live' && player.shown > 4")
    assert len(running.engine.sessions) == 1


def test_where_the_engine_is_slow_the_picture_is_slow_and_not_in_jerks(serve, open_page):
    tab = open_page(serve(frame_rate=32.0, chunk=8, delay=0.5, examples=[DAY]))  # 16 of 32 frames a second
    tab.wait("player.shown > 80")
    intervals = np.array(tab.run("page.intervals.slice(-60)"))
    assert 45 < np.median(intervals) < 120, "some 62.5 ms, and not 31 in bursts"


def test_nothing_is_wider_than_a_phone(serve, open_page):
    tab = open_page(serve(frame_rate=16.0, examples=[DAY, NIGHT, "x" * 100]), width=360, height=700)
    tab.wait("player.shown > 4")
    assert tab.run("[document.documentElement.scrollWidth, innerWidth]") == [360, 360]
    box = tab.run("(({width, height}) => [width, height])(document.getElementById('picture').getBoundingClientRect())")
    assert box[0] == box[1] >= 300, "square stays square, and large"


RECORD = os.environ.get("STREAMDIT_RECORD")  # a directory: docs, to renew the figure and the numbers of the guide
MEASURE = """(() => { const c = document.getElementById('picture');
    const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data; let s = 0;
    for (let i = 0; i < d.length; i++) s += i % 4 < 3 ? d[i] : 0;
    return s / (d.length / 4 * 3); })()"""


def brightness(tab, seconds=3.0):
    """Mean of the canvas over some seconds."""
    until, seen = time.monotonic() + seconds, []
    while time.monotonic() < until:
        seen.append(tab.run(MEASURE))
        time.sleep(0.1)
    return float(np.mean(seen))


def test_the_bundled_model_in_the_page(serve, open_page):
    """What a visitor sees of the model that ships: day turns into night when the prompt says so."""
    day, night = EXAMPLES[:2]
    with Engine(sd.load("roadtrip"), slots=1, queue_chunks=1) as engine:
        running = serve(engine=engine, examples=EXAMPLES, guidance=engine.pipeline.config.sampling.guidance)
        tab = open_page(running, dark=True, height=830)
        tab.wait("player.shown > 64", 120)
        by_day = brightness(tab)
        tab.steer(night)
        tab.wait("page.sent[0].over", 120)
        tab.wait(f"player.shown > page.sent[0].complete + {2 * engine.scheme.num_chunks * 8}", 120)
        at_night = brightness(tab)
        reached, fps = tab.run("page.sent[0].reached"), tab.run("Number(document.getElementById('fps').textContent)")
        assert reached > 0 and fps > 0 and tab.run("page.sent[0].line.textContent").startswith("reached the picture")
        assert 5 < at_night < 0.7 * by_day < 180, "day turned into night, and neither is a blank"
        if RECORD:
            record = {
                "command": "STREAMDIT_RECORD=docs pytest tests/serving/test_browser.py -k bundled",
                "hardware": hardware(),
                "versions": versions(),
                "browser": tab.browser.call("Browser.getVersion")["product"],
                "prompts": [day, night],
                "mean_by_day": round(by_day, 1),
                "mean_at_night": round(at_night, 1),
                "prompt_to_picture_seconds": round(reached / 1000, 2),
                "frames_per_second_shown": fps,
                "engine": engine.stats(),
            }
            Path(RECORD, "results", "page.json").write_text(json.dumps(record, indent=1) + "\n")
            tab.picture(Path(RECORD, "figures", "page.png"))
