"""A real browser, spoken to through its debugging pipe: two file descriptors, JSON, NUL bytes."""

import base64
import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run")

# The browser looks at descriptors 3 and 4. A preexec_fn would fork, of which JAX warns.
AS_THREE_AND_FOUR = """
import os, sys
copies = [os.dup(int(number)) for number in sys.argv[1:3]]
for number, copy in zip((3, 4), copies):
    os.dup2(copy, number)
    os.set_inheritable(number, True)  # dup2 of a descriptor to itself leaves that out
os.execv(sys.argv[3], sys.argv[3:])
"""


def find() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One open page. requests: the addresses that it asked for. complaints: console, errors."""

    def __init__(self, read: int, write: int):
        self._read, self._write, self._buffer, self._id = read, write, b"", 0
        self._session: str | None = None
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._loaded = False
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        attached = self._call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, url: str, dark: bool = False) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])
        self._loaded = False
        self._call("Page.navigate", url=url)
        self._until(lambda: self._loaded)

    def evaluate(self, expression: str):
        """The value of a JavaScript expression in the page."""
        result = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip

    def screenshot(self, path: Path) -> None:
        shot = self._call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **params):
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        answers: list[dict] = []
        mine = self._id
        self._until(
            lambda: bool(answers), lambda m: answers.append(m) if m.get("id") == mine else 0
        )
        assert "result" in answers[0], answers[0]
        return answers[0]["result"]

    def _until(self, done, also=lambda message: None, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not done():
            ready, _, _ = select.select([self._read], [], [], max(0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
            *messages, self._buffer = self._buffer.split(b"\0")
            for message in map(json.loads, messages):
                self._note(message)
                also(message)

    def _note(self, message: dict) -> None:
        params = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            case "Log.entryAdded" | "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(params))
            case "Page.loadEventFired":
                self._loaded = True


@contextlib.contextmanager
def browser(profile: Path):
    """A `Page` of a headless browser whose files lie in `profile`."""
    path = find()
    assert path is not None
    to_browser, write = os.pipe()
    read, from_browser = os.pipe()

    process = subprocess.Popen(
        [sys.executable, "-c", AS_THREE_AND_FOUR, str(to_browser), str(from_browser), path, *FLAGS,
         f"--user-data-dir={profile}"],
        pass_fds=(to_browser, from_browser), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(to_browser)
    os.close(from_browser)
    try:
        yield Page(read, write)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()
        os.close(read)
        os.close(write)
