"""Chromium without a window, driven over the Chrome DevTools protocol: pages are shown, pointed at, clicked, typed at, pictured."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

_START = 120  # seconds at most, for the browser to come up on a busy machine, and for any answer of it
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",  # a free one, which it says
)
_KEYS = {
    "ArrowRight": 39,
    "ArrowLeft": 37,
    "ArrowDown": 40,
    "ArrowUp": 38,
    "Escape": 27,
    "Tab": 9,
    "Home": 36,
    "End": 35,
}


def installed() -> str | None:
    """Chromium's or Chrome's path: what CHROMIUM names, or what is found; None where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
    return os.environ.get("CHROMIUM") or next((path for name in names if (path := shutil.which(name))), None)


@contextmanager
def opened(program: str) -> Iterator[Tab]:
    """A tab of a browser of its own, which ends with the block."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open(Path(folder, "said"), "w") as said:
        profile = Path(folder, "profile")
        command = [program, *_OPTIONS, f"--user-data-dir={profile}", "about:blank"]
        browser = subprocess.Popen(command, stderr=said, stdout=said)
        try:
            with connect(_address(browser, profile), max_size=None, proxy=None) as socket:
                yield Tab(socket)
                socket.send(json.dumps({"id": 0, "method": "Browser.close"}))
                browser.wait(_START)
        finally:
            browser.kill()
            browser.wait()


def _address(browser: subprocess.Popen[bytes], profile: Path) -> str:
    """Of its socket, which it writes into its profile when it listens there."""
    written, end = profile / "DevToolsActivePort", time.monotonic() + _START
    while time.monotonic() < end and browser.poll() is None:
        if written.exists() and len(lines := written.read_text().split()) == 2:
            return f"ws://127.0.0.1:{lines[0]}{lines[1]}"
        time.sleep(0.05)
    raise RuntimeError(f"The browser does not come up, and says: {(profile.parent / 'said').read_text()}")


class Tab:
    """One page at a time."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket, self._count, self._session = socket, 0, None
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self._ask(f"{domain}.enable")
        self.errors: list[str] = []

    def _ask(self, method: str, **params: Any) -> Any:
        self._count += 1
        session = {"sessionId": self._session} if self._session else {}
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": params, **session}))
        while True:
            told = self._next()
            if told.get("id") == self._count:
                if "error" in told:
                    raise RuntimeError(f"{method}: {told['error']}")
                return told["result"]

    def _next(self) -> Any:
        told = json.loads(self._socket.recv(_START))
        if told.get("method") == "Runtime.exceptionThrown":
            details = told["params"]["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description") or details["text"])
        if told.get("method") == "Log.entryAdded" and told["params"]["entry"]["level"] == "error":
            self.errors.append(told["params"]["entry"]["text"])
        return told

    def show(self, page: Path | str, *, width: int = 1000, height: int = 1100, dark: bool = False) -> None:
        """Open a page, as wide as given, for a reader of light or dark pages; until it is loaded and drawn."""
        self.errors = []
        self._ask("Page.navigate", url="about:blank")  # (a page that is open already would be no event)
        self.look(width=width, height=height, dark=dark)
        self._ask("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        self.value(
            "new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', () => done()))"
        )
        self.drawn()

    def look(self, *, width: int = 1000, height: int = 1100, dark: bool = False) -> None:
        """Another width, or the other look, of the page as it is."""
        # A phone has a viewport of its own, and a page may set its width; a window on a desk has not.
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self._ask("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[feature])

    def drawn(self) -> None:
        """Until two more frames are drawn."""
        self.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))")

    def value(self, expression: str) -> Any:
        """What JavaScript says, promises waited for. Raises RuntimeError where it throws."""
        told = self._ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{expression}: {told['exceptionDetails'].get('exception', {}).get('description')}")
        return told["result"].get("value")

    def until(self, condition: str) -> None:
        """Wait until JavaScript says that it is so. Raises RuntimeError where it does not come to be."""
        self.value(
            f"new Promise((done, fail) => {{ const end = Date.now() + 60000, look = () => ({condition}) ? done() :"
            f" Date.now() > end ? fail(new Error({json.dumps(condition)})) : setTimeout(look, 20); look(); }})"
        )

    def middle(self, selector: str) -> tuple[float, float]:
        """Of the element, scrolled into sight."""
        x, y = self.value(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.scrollIntoView({{block: 'nearest'}});"
            " const box = one.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        return x, y

    def point(self, x: float, y: float) -> None:
        """Move the pointer there."""
        self._ask("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.drawn()

    def click(self, x: float, y: float) -> None:
        """Move the pointer there, and press its first button."""
        self.point(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self._ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.drawn()

    def press(self, key: str) -> None:
        """A key such as "ArrowRight"."""
        for kind in ("keyDown", "keyUp"):
            self._ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=_KEYS[key])
        self.drawn()

    def picture(self, path: Path) -> None:
        """All of the page, down to its end."""
        size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 8000), "scale": 1}
        told = self._ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(told["data"]))

    def too_wide(self) -> int:
        """By how many pixels the page can be scrolled sideways; 0 is as it should be."""
        return int(self.value("document.documentElement.scrollWidth - document.documentElement.clientWidth"))
