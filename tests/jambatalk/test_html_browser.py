"""The page in a real browser, without a screen: it draws a face, follows the sound, and its controls do what they say.

Skipped where there is no Chromium or Chrome. The browser is driven through its DevTools protocol over a pipe (two
descriptors, JSON messages ended by a zero byte), which needs nothing but the standard library.
"""

import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from urllib.parse import unquote, urlparse

import numpy as np
import pytest

from jambatalk.animation import Animation

BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
        if (found := shutil.which(name))
    ),
    None,
)
pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine"),
    pytest.mark.skipif(os.name != "posix", reason="the browser is driven through inherited descriptors"),
]
SECONDS = 2.0


def head():
    """A round head with eyes, a mouth and a tongue, that opens its mouth in every second half of a second."""
    rows, columns, radius = 30, 40, 0.1
    polar, around = np.meshgrid(
        np.linspace(0, np.pi, rows), np.linspace(0, 2 * np.pi, columns, endpoint=False), indexing="ij"
    )
    ball = np.stack([np.sin(polar) * np.sin(around), np.cos(polar), np.sin(polar) * np.cos(around)], -1).reshape(-1, 3)
    i, j = (index.ravel() for index in np.meshgrid(np.arange(rows - 1), np.arange(columns), indexing="ij"))
    a, b = i * columns + j, i * columns + (j + 1) % columns
    triangles = np.concatenate([np.stack([a, a + columns, b], -1), np.stack([b, a + columns, b + columns], -1)])
    parts = [(ball * radius, 0), (ball * 0.013 + [0.032, 0.02, 0.088], 1), (ball * 0.013 + [-0.032, 0.02, 0.088], 1)]
    vertices = np.concatenate([v for v, _ in parts])
    part = np.concatenate([np.full(len(v), label) for v, label in parts])
    faces = np.concatenate([triangles + k * len(ball) for k in range(len(parts))])
    skin = vertices[: len(ball)]
    mouth = np.exp(-((skin[:, 0] / 0.03) ** 2 + ((skin[:, 1] + 0.045) / 0.012) ** 2)) * (skin[:, 2] > 0)
    upper = np.flatnonzero((mouth > 0.2) & (skin[:, 1] > -0.045))[:4]
    lower = np.flatnonzero((mouth > 0.2) & (skin[:, 1] < -0.045))[:4]
    open_mouth = np.zeros((len(vertices), 3))
    open_mouth[: len(ball), 2] = -mouth
    open_mouth[: len(ball), 1] = -0.5 * mouth * (skin[:, 1] < -0.045)
    frames = round(SECONDS * 30)
    amount = 0.03 * (np.arange(frames) // 15 % 2)
    sound = 0.3 * np.sin(2 * np.pi * 200 * np.arange(round(16000 * SECONDS)) / 16000)
    return Animation(
        amount[:, None],
        open_mouth.reshape(-1, 1),
        vertices,
        faces,
        30,
        audio=(sound.astype(np.float32), 16000),
        regions={"part": part, "inner_lip_upper": upper, "inner_lip_lower": lower},
        opening_scale=0.02,
        subject="a ball",
    )


class Browser:
    def __init__(self, profile):
        to_browser, from_browser = os.pipe(), os.pipe()
        self.write, self.read = to_browser[1], from_browser[0]

        def descriptors():  # the protocol's pipes are descriptors 3 (commands) and 4 (answers)
            read, write = os.dup(to_browser[0]), os.dup(from_browser[1])
            os.dup2(read, 3)
            os.dup2(write, 4)

        self.process = subprocess.Popen(
            [
                BROWSER,
                "--headless",
                "--no-sandbox",
                "--remote-debugging-pipe",
                "--use-angle=swiftshader",
                "--enable-unsafe-swiftshader",
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-dev-shm-usage",
                f"--user-data-dir={profile}",
                "--window-size=800,700",
                "about:blank",
            ],
            preexec_fn=descriptors,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser[0])
        os.close(from_browser[1])
        self.numbers, self.buffer, self.problems = itertools.count(1), b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    session, loaded = None, False

    def call(self, method, **parameters):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 60
        while True:
            while b"\0" in self.buffer:
                text, self.buffer = self.buffer.split(b"\0", 1)
                answer = json.loads(text)
                if answer.get("id") == number:
                    assert "error" not in answer, answer["error"]
                    return answer["result"]
                self.note(answer)
            ready, _, _ = select.select([self.read], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"the browser did not answer {method}"
            data = os.read(self.read, 1 << 16)
            assert data, "the browser went away"
            self.buffer += data

    def note(self, event):
        """Everything that a visitor would find in the console, and every request that leaves the page."""
        parameters = event.get("params", {})
        if event.get("method") == "Page.loadEventFired":
            self.loaded = True
        if event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(parameters["exceptionDetails"])[:500])
        if event.get("method") == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.problems.append(parameters["entry"]["text"])
        if event.get("method") == "Network.requestWillBeSent":
            url = parameters["request"]["url"]
            if not url.startswith(("file:", "blob:", "data:", "about:")):
                self.problems.append(f"request to {url}")

    def run(self, expression):
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def wait(self, expression, seconds=30):
        end = time.monotonic() + seconds
        while not self.run(expression):
            assert time.monotonic() < end, f"{expression} did not come true; {self.problems}"
            time.sleep(0.05)

    def open(self, url):
        for address in ("about:blank", url):  # going from #a to #b of one page would not load it anew
            self.loaded = False
            self.call("Page.navigate", url=address)
            while not self.loaded:
                self.call("Page.bringToFront")  # any call: events come in between
        self.wait("document.documentElement.dataset.ready")

    def key(self, key, code=None):
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                code=code or key,
                **({"text": key} if len(key) == 1 else {}),
            )

    def picture(self):
        """(height, width, 4) uint8: what is drawn now, straight from WebGL."""
        width, height, pixels = self.run("""(() => {
          const { stage } = viewer, gl = stage.gl, w = gl.drawingBufferWidth, h = gl.drawingBufferHeight;
          stage.face.pose(viewer.clock.now()); stage.draw();
          const out = new Uint8Array(4 * w * h);
          gl.readPixels(0, 0, w, h, gl.RGBA, gl.UNSIGNED_BYTE, out);
          let text = "";
          for (let i = 0; i < out.length; i += 8192) text += String.fromCharCode(...out.subarray(i, i + 8192));
          return [w, h, btoa(text)];
        })()""")
        return np.frombuffer(base64.b64decode(pixels), np.uint8).reshape(height, width, 4)[::-1]

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.write)
        os.close(self.read)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page with a space") / "Gesicht – 顔.html"
    head().save(path)
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def difference(a, b):
    return np.abs(a.astype(int) - b.astype(int)).max(-1) > 24


def test_the_face_is_drawn_and_moves(browser, page):
    browser.open(f"{page}#t=0.25")
    assert browser.run("document.documentElement.dataset.ready") == "yes"
    assert browser.run("document.documentElement.dataset.frame") == "7"
    closed = browser.picture()
    drawn = closed[..., 3] > 0
    assert 0.1 < drawn.mean() < 0.7  # a head, and room around it
    rows, columns = np.nonzero(drawn)
    assert abs(columns.mean() / closed.shape[1] - 0.5) < 0.05 and rows.min() > 0
    assert closed[drawn][:, :3].std() > 10  # shaded, not flat
    again = browser.picture()
    assert not difference(closed, again).any()

    browser.run("location.hash = '#t=0.75'")
    browser.wait("document.documentElement.dataset.frame === '22'")
    opened = difference(closed, browser.picture())
    assert opened.sum() > 200
    rows, columns = np.nonzero(opened)  # only the mouth: below the middle of the head, not its rim
    middle = np.nonzero(drawn)[0].mean()
    assert np.median(rows) > middle and opened.sum() < 0.3 * drawn.sum()
    assert browser.problems == []


def test_the_controls_are_there_and_named(browser, page):
    browser.open(page)
    assert browser.run("document.getElementById('facts').textContent") == "a ball · 3600 vertices · 60 frames at 30 fps"
    names = browser.run(
        "[...document.querySelectorAll('button, input, select')].map(e => e.getAttribute('aria-label'))"
    )
    assert names == ["Play", "Time", "Speed", "Loop", "Front view"]
    assert browser.run(
        "[...document.querySelectorAll('footer button')].every(e => e.getBoundingClientRect().width >= 30)"
    )
    assert browser.run("document.getElementById('message').hidden")
    assert browser.run("document.getElementById('time').textContent") == "0:00.0 / 0:02.0"
    # The timeline shows something: not one colour.
    assert (
        browser.run(
            "(() => { const c = $('curves'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;"
            "return new Set(new Uint32Array(d.buffer)).size; })()"
        )
        > 5
    )


def test_the_sound_is_the_clock(browser, page):
    browser.open(page)
    # At a quarter of the speed, so that a busy machine gets to look before the clip has ended.
    browser.run(
        "(() => { const s = document.getElementById('speed'); s.value = '0.25';"
        "         s.dispatchEvent(new Event('change')); })()"
    )
    browser.run("document.getElementById('play').click()")
    browser.wait("viewer.clock.sound.currentTime > 0.2 && document.documentElement.dataset.time > 0.2")
    sound, clock = browser.run("[viewer.clock.sound.currentTime, viewer.clock.now()]")
    assert abs(sound - clock) < 0.1
    assert browser.run("viewer.clock.sound.playbackRate") == 0.25
    assert browser.run("document.getElementById('play').getAttribute('aria-label')") == "Pause"
    browser.run("document.getElementById('play').click()")
    browser.wait("!viewer.clock.playing && viewer.clock.sound.paused")
    before = browser.run("viewer.clock.now()")
    time.sleep(0.2)
    assert browser.run("viewer.clock.now()") == before
    assert abs(browser.run("viewer.clock.sound.currentTime") - before) < 0.1

    browser.run("viewer.clock.seek(1.8); document.getElementById('play').click()")
    browser.wait("!viewer.clock.playing")  # to the end, and stops there
    browser.wait("document.documentElement.dataset.frame === '59'")
    assert browser.problems == []


def test_scrubbing_and_keys(browser, page):
    browser.open(page)
    browser.run(
        "(() => { const s = document.getElementById('scrub'); s.value = 1.25; s.dispatchEvent(new Event('input')); })()"
    )
    browser.wait("document.documentElement.dataset.frame === '37'")
    assert abs(browser.run("viewer.clock.sound.currentTime") - 1.25) < 0.01
    for key, frame in (
        ("ArrowRight", 39),
        ("ArrowRight", 40),
        ("ArrowLeft", 39),
        ("Home", 0),
        ("End", 59),
    ):  # 37.5 rounds to 38
        browser.key(key)
        browser.wait(f"document.documentElement.dataset.frame === '{frame}'")
    browser.key("Home")
    browser.key(" ", "Space")
    browser.wait("viewer.clock.playing")
    browser.key(" ", "Space")
    browser.wait("!viewer.clock.playing")


def test_orbit_and_zoom(browser, page):
    browser.open(f"{page}#t=0.25")
    front = browser.picture()

    def mouse(kind, x, y, **more):
        browser.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", **more)

    mouse("mousePressed", 400, 250, clickCount=1)
    mouse("mouseMoved", 500, 270, buttons=1)
    mouse("mouseReleased", 500, 270, clickCount=1)
    assert browser.run("viewer.stage.yaw") > 0.3
    assert difference(front, browser.picture()).sum() > 500
    before = (browser.picture()[..., 3] > 0).sum()
    browser.call("Input.dispatchMouseEvent", type="mouseWheel", x=400, y=250, deltaX=0, deltaY=-300)
    browser.wait("viewer.stage.zoom > 1.2")
    assert (browser.picture()[..., 3] > 0).sum() > 1.2 * before
    browser.run("document.getElementById('front').click()")
    assert not difference(front, browser.picture()).any()


def test_narrow_window(browser, page):
    browser.call("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=2, mobile=True)
    try:
        browser.open(page)
        assert browser.run("document.documentElement.scrollWidth") <= 360
        assert browser.run(
            "[...document.querySelectorAll('footer *')].every(e => e.getBoundingClientRect().right <= 360)"
        )
        drawn = browser.picture()[..., 3] > 0
        rows, columns = np.nonzero(drawn)
        assert columns.min() > 0 and columns.max() < drawn.shape[1] - 1  # the whole head, both sides
    finally:
        browser.call("Emulation.clearDeviceMetricsOverride")


def test_a_damaged_page_says_so(browser, tmp_path, page):
    text = open(unquote(urlparse(page).path), encoding="utf-8").read()
    start = text.index('id="geometry">') + len('id="geometry">')
    (tmp_path / "bad.html").write_text(text[:start] + text[start + 4000 :], "utf-8")
    browser.open((tmp_path / "bad.html").as_uri())
    assert browser.run("document.documentElement.dataset.ready") == "no"
    assert not browser.run("document.getElementById('message').hidden")
    browser.problems.clear()
