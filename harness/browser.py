"""A headless Chromium, driven by its DevTools protocol over a pair of pipes: no port, no library."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

CHROMIUM: Final = (
    shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
)
ABSENT: Final = "chromium is not installed; Debian's package chromium has it"
_START: Final = (
    "import os, sys; a, b = map(int, sys.argv[1:3]); os.dup2(a, 3); os.dup2(b, 4); "
    "os.set_inheritable(3, True); os.set_inheritable(4, True); os.execv(sys.argv[3], sys.argv[3:])"
)
"""The browser reads its commands from descriptor 3, and answers on 4."""
_ANSWER_S: Final = 30.0
_CODES: Final = {"Escape": 27, "Tab": 9, "Enter": 13}
"""Keys that the browser itself acts on, which it knows by number."""


class PageFailed(Exception):
    """What the browser was told to do failed, or what was waited for did not come."""


class Browser:
    """One page in one browser. ``said`` are the errors that the page wrote, ``sent`` what it asked for.

    A page that was there before may write and ask for a while; of what it asks, nothing is in ``sent``.
    """

    def __init__(self, *, width: int = 1366, height: int = 768, flags: tuple[str, ...] = ()) -> None:
        assert CHROMIUM is not None, ABSENT
        self.said: list[str] = []
        self.sent: list[str] = []
        self._origin = ""  # of the page that was opened last
        self._folder = tempfile.TemporaryDirectory(prefix="cw-browser-", ignore_cleanup_errors=True)
        ours_read, theirs_write = os.pipe()
        theirs_read, ours_write = os.pipe()
        arguments = [
            "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
            "--disable-extensions", "--disable-background-networking", "--disable-component-update",
            "--hide-scrollbars", "--mute-audio", "--remote-debugging-pipe", "--force-color-profile=srgb",
            f"--user-data-dir={self._folder.name}", f"--window-size={width},{height}", *flags, "about:blank",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs_read), str(theirs_write), CHROMIUM, *arguments],
            pass_fds=(theirs_read, theirs_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs_read)
        os.close(theirs_write)
        self._read, self._write = ours_read, ours_write
        self._rest = b""
        self._number = 0
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.size(width, height)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self._read)
        os.close(self._write)
        self._folder.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Have the browser do something; its result. Raises :class:`PageFailed`."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        data = json.dumps(command).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        until_s = time.monotonic() + _ANSWER_S
        while True:
            found = self._message(until_s)
            if found is None:
                raise PageFailed(f"{method}: no answer within {_ANSWER_S:g} s")
            if found.get("id") == self._number:
                if "error" in found:
                    raise PageFailed(f"{method}: {found['error']['message']}")
                result: dict[str, Any] = found["result"]
                return result

    def open(self, url: str) -> None:
        """Load a page."""
        self._origin = "/".join(url.split("/")[:3])
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page; promises are waited for. Raises :class:`PageFailed`."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in found:
            raise PageFailed(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def until(self, script: str, timeout_s: float = 30.0) -> Any:
        """Wait until an expression is true; its value."""
        until_s = time.monotonic() + timeout_s
        while not (found := self.run(script)):
            if time.monotonic() > until_s:
                raise PageFailed(f"not within {timeout_s:g} s: {script}; the page said {self.said}")
            time.sleep(0.05)
        return found

    def size(self, width: int, height: int, *, mobile: bool = False, ratio: float = 1.0) -> None:
        """Make the page that large."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, mobile=mobile,
            deviceScaleFactor=ratio,
        )  # fmt: skip

    def prefer(self, scheme: str) -> None:
        """Whether the user likes it ``light`` or ``dark``."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def press(self, key: str, code: str = "", text: str = "") -> None:
        """Press a key, and let it go."""
        more: dict[str, Any] = {"text": text} if text else {}
        if key in _CODES:
            more["windowsVirtualKeyCode"] = _CODES[key]
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=code or key, **more)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=code or key)

    def mouse(self, what: str, x: float, y: float, *, down: bool = False) -> None:
        """``mousePressed``, ``mouseReleased`` or ``mouseMoved``."""
        button = "left" if down or what != "mouseMoved" else "none"
        self.call("Input.dispatchMouseEvent", type=what, x=x, y=y, button=button, clickCount=1)

    def click(self, x: float, y: float) -> None:
        """Click there."""
        self.mouse("mouseMoved", x, y)
        self.mouse("mousePressed", x, y)
        self.mouse("mouseReleased", x, y)

    def picture(self, path: Path) -> None:
        """Write what is to be seen, as PNG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def _message(self, until_s: float) -> dict[str, Any] | None:
        """The next message of the browser, None if there was none in time."""
        while b"\0" not in self._rest:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not select.select([self._read], [], [], left_s)[0]:
                return None
            data = os.read(self._read, 1 << 20)
            if not data:
                raise PageFailed("the browser ended")
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(text)
        self._note(found)
        return found

    def _note(self, found: dict[str, Any]) -> None:
        about = found.get("params", {})
        match found.get("method"):
            case "Runtime.exceptionThrown":
                details = about["exceptionDetails"]
                self.said.append(str(details.get("exception", {}).get("description") or details["text"]))
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                self.said.append(" ".join(str(one.get("value", one)) for one in about["args"]))
            case "Log.entryAdded" if about["entry"]["level"] == "error":
                self.said.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
            case "Network.requestWillBeSent" if str(about["documentURL"]).startswith(self._origin):
                self.sent.append(str(about["request"]["url"]))
            case _:
                pass
