"""The report as a browser shows it: headless Chromium, told what to do through its own pipe."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed")

_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, number in zip(ends, (3, 4)):  # where --remote-debugging-pipe looks
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page of a headless Chromium.

    It is spoken to by the DevTools protocol (chromedevtools.github.io/devtools-protocol) over a pipe: JSON, ended by a
    zero byte. Nothing but the standard library is needed.
    """

    def __init__(self, profile: Path) -> None:
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        assert CHROMIUM is not None
        self._process = subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(theirs_in), str(theirs_out), CHROMIUM, "--headless", "--no-sandbox",
             "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={profile}"],
            pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self._rest, self._count, self._session = b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self(f"{domain}.enable")

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            read = os.read(self._from, 1 << 20)
            assert read, "the browser has ended"
            self._rest += read
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, page: Path, width: int, scheme: str = "light") -> None:
        """Shows a page at a width in CSS pixels, in a color scheme."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.media(scheme)
        self.events.clear()
        self("Page.navigate", url=page.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def media(self, scheme: str, media: str = "screen") -> None:
        self("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])

    def js(self, expression: str) -> Any:
        result = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def soon(self, expression: str) -> Any:
        """What an expression gives as soon as that is true, or after ten seconds."""
        return self.js(
            "new Promise(done => { const end = Date.now() + 10000; const look = () => {"
            f"const value = {expression}; value || Date.now() > end ? done(value) : setTimeout(look, 50); "
            "}; look(); })"
        )

    def tab(self) -> str:
        """Presses Tab; which element has the focus then, by its place in the document."""
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        return self.js("[...document.querySelectorAll('*')].indexOf(document.activeElement)")

    def close(self) -> None:
        os.close(self._to)
        os.close(self._from)
        self._process.terminate()
        self._process.wait(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.fixture(scope="module", params=["by hand", pytest.param("of a run", marks=pytest.mark.slow)])
def page(request: pytest.FixtureRequest) -> Path:
    if request.param == "by hand":
        return request.getfixturevalue("reported").path
    return request.getfixturevalue("journey") / "run" / "evaluation" / "report.html"


def test_nothing_is_asked_for_and_nothing_is_complained_of(browser, page):
    browser.open(page, 1200)
    browser.js("scrollTo(0, document.body.scrollHeight)")
    time.sleep(0.2)
    browser.js("1")
    asked = [
        event["params"]["request"]["url"] for event in browser.events if event["method"] == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    said = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in browser.events if event["method"] in said] == []


def test_the_watch_sees_what_it_looks_for(browser, tmp_path):
    """A page that does what the report must not."""
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://127.0.0.1:9/x.png'><script>console.error('no')</script>", encoding="utf-8")
    browser.open(bad, 400)
    time.sleep(0.2)
    browser.js("1")
    methods = [event["method"] for event in browser.events]
    assert methods.count("Network.requestWillBeSent") == 2 and "Runtime.consoleAPICalled" in methods
    assert "Log.entryAdded" in methods  # the picture that did not come


@pytest.mark.parametrize("width", [400, 1200, 1600])
def test_nothing_goes_beyond_the_window(browser, page, width):
    browser.open(page, width)
    assert browser.js("innerWidth") == width
    assert browser.js("document.documentElement.scrollWidth") == width
    beyond = """[...document.querySelectorAll('main *')].filter(e => {
        const box = e.getBoundingClientRect();
        return box.width && box.right > innerWidth + 1 && !e.closest('.wide');
    }).map(e => e.outerHTML.slice(0, 80))"""
    assert browser.js(beyond) == []


def test_every_picture_is_shown_and_said(browser, page):
    browser.open(page, 1200)
    pictures = browser.js("[...document.images].map(i => [i.naturalWidth, i.alt, i.closest('figure').innerText])")
    assert len(pictures) >= 11
    for width, text, caption in pictures:
        assert width > 0 and len(text) > 10 and len(caption.strip()) > 5
    assert page.stat().st_size < 2_500_000


def test_every_control_is_reached_by_keyboard(browser, page):
    browser.open(page, 1200)
    controls = "a[href], summary, [tabindex='0']"
    wanted = browser.js(f"[...document.querySelectorAll('*')].flatMap((e, i) => e.matches(\"{controls}\") ? [i] : [])")
    assert len(wanted) > 20
    assert browser.tab() == wanted[0]
    assert browser.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"  # the focus is seen
    assert [browser.tab() for _ in wanted[1:]] == wanted[1:]  # in the order of reading


def test_a_threshold_is_explained_at_the_press_of_a_key(browser, page):
    browser.open(page, 400)
    browser.js("document.querySelector('summary').focus()")
    for kind, text in (("keyDown", "\r"), ("keyUp", "")):
        browser("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", text=text, windowsVirtualKeyCode=13)
    assert browser.js("document.querySelector('details').open")
    assert browser.js("document.querySelector('details p').getBoundingClientRect().height") > 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(browser, page, scheme):
    """Contrast of 4.5 or more, WCAG 2.2's level AA."""
    browser.open(page, 1200, scheme)
    browser.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    colors = browser.js("""[...document.querySelectorAll('body *')].filter(e =>
        [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())).map(e => {
        let behind = e;
        while (behind && getComputedStyle(behind).backgroundColor === 'rgba(0, 0, 0, 0)') behind = behind.parentElement;
        return [getComputedStyle(e).color, getComputedStyle(behind).backgroundColor, e.textContent.slice(0, 40)];
    })""")
    assert len(colors) > 100
    for front, back, text in colors:
        assert _contrast(front, back) >= 4.5, (front, back, text)
    page_color = browser.js("getComputedStyle(document.body).backgroundColor")
    assert (_luminance(page_color) > 0.5) == (scheme == "light")


def _luminance(color: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(front: str, back: str) -> float:
    low, high = sorted([_luminance(front), _luminance(back)])
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_printed(browser, page, scheme):
    browser.open(page, 1200, scheme)
    printed = base64.b64decode(browser("Page.printToPDF", printBackground=True)["data"])
    assert printed.startswith(b"%PDF-")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) < 40
    browser.media(scheme, media="print")
    shown = "[...document.querySelectorAll('details p')].every(p => p.checkVisibility({contentVisibilityAuto: true}))"
    assert browser.soon(shown)  # paper has nothing to press
    assert browser.js("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert _luminance(browser.js("getComputedStyle(document.querySelector('.quiet')).color")) < 0.2  # dark on white
