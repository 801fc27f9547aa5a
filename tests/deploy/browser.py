"""A page in headless Chromium, spoken to by its DevTools protocol over one websocket. Whatever the page asks for is recorded."""

from __future__ import annotations

import base64
import itertools
import json
import os
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import ClientConnection, connect

WAIT_S = 120.0
NAMES = ("chromium", "chromium-browser", "google-chrome")


class Page:
    """One tab. `requests` are the URLs that it has asked for, `problems` the errors on it that are no answers of HTTP."""

    def __init__(self, socket: ClientConnection) -> None:
        self.requests: list[str] = []
        self.problems: list[str] = []
        self._socket = socket
        self._ids = itertools.count(1)
        self._session: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def size(self, width: int, height: int, dark: bool = False) -> None:
        """Of the window."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url: str) -> None:
        """Begins to load it; `wait` says when it is there."""
        self._call("Page.navigate", url=url)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, or of the promise that it is.

        Raises:
            AssertionError: it throws.
        """
        answer = self._call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, expression: str) -> Any:
        """The value of an expression as soon as it is true."""
        look = f"""new Promise((ok, no) => {{
            const end = Date.now() + {WAIT_S * 1000:.0f};
            const look = () => {{
                const is = ({expression});
                if (is) ok(is);
                else if (Date.now() > end) no(new Error(document.body.innerText));
                else setTimeout(look, 20);
            }};
            look();
        }})"""
        return self.run(look)

    def type(self, selector: str, text: str) -> None:
        """As if by hand, into an input; its end is Enter."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self._call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r")

    def click(self, selector: str) -> None:
        """As if by hand, in the middle of the element, wherever that is."""
        where = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"{where} && !{where}.disabled")
        self.run(f"{where}.scrollIntoView({{block: 'center', inline: 'center'}})")
        x, y = self.run(f"(() => {{ const b = {where}.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; }})()")
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._ids)
        session = {"sessionId": self._session} if self._session else {}
        self._socket.send(json.dumps({"id": number, "method": method, "params": params, **session}))
        while True:
            message = json.loads(self._socket.recv(timeout=WAIT_S + 10))
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, event: str, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] == "error" and params["entry"]["source"] != "network":
            self.problems.append(str(params["entry"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Page]:
    """A page of a browser of its own, which can reach this machine only. Skips the test where there is no Chromium."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip(f"no {NAMES[0]} on this machine")
    flags = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={profile}", "--no-first-run", "--disable-gpu"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]
    flags += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")  # it refuses to run as root with one
    process = subprocess.Popen([binary, *flags], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: [lines.put(line) for line in process.stderr or ()], daemon=True).start()
    try:
        while "DevTools listening on " not in (line := lines.get(timeout=WAIT_S)):
            pass
        with connect(line.split()[-1], max_size=None, compression=None) as socket:
            yield Page(socket)
    finally:
        process.kill()
        process.wait(WAIT_S)
