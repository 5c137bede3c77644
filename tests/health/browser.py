"""A real Chromium without a screen, driven by its DevTools protocol over a pipe."""

import base64
import json
import os
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fcntl import F_DUPFD_CLOEXEC, fcntl
from pathlib import Path

from processes import eventually
from tools import tool

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
READS_FD, WRITES_FD = 3, 4  # where Chromium expects the two ends of the pipe
ABOVE_FD = 10
ANSWER_WITHIN_S = 60.0


class Browser:
    """One window; `messages` are what its console and its policy have complained about."""

    def __init__(self, program: str, profile: Path) -> None:
        (reads, self._write), (self._read, writes) = _pipe(), _pipe()
        nowhere = (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
        ends = [(os.POSIX_SPAWN_DUP2, reads, READS_FD), (os.POSIX_SPAWN_DUP2, writes, WRITES_FD)]
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._pid = os.posix_spawn(program, command, os.environ, file_actions=[nowhere, *ends], setpgroup=0)
        os.close(reads)
        os.close(writes)
        self._id = 0
        self._received = b""
        self._session = ""
        self.messages: list[str] = []

    def attach(self) -> None:
        targets = eventually(self._pages, "a window", ANSWER_WITHIN_S)
        attached = self.call("Target.attachToTarget", targetId=targets[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def _pages(self) -> list[dict]:
        return [each for each in self.call("Target.getTargets")["targetInfos"] if each["type"] == "page"]

    def close(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, **params: object) -> dict:
        self._id += 1
        order = {"id": self._id, "method": method, "params": params}
        if self._session:
            order["sessionId"] = self._session
        os.write(self._write, json.dumps(order).encode() + b"\0")
        end_s = time.monotonic() + ANSWER_WITHIN_S
        while (said := self._receive(end_s)).get("id") != self._id:
            self._note(said)
        assert "error" not in said, (method, said)
        return said["result"]

    def _receive(self, end_s: float) -> dict:
        while b"\0" not in self._received:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end_s - time.monotonic()))
            assert ready, "Chromium does not answer"
            received = os.read(self._read, 1 << 16)
            assert received, "Chromium has ended"
            self._received += received
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def _note(self, said: dict) -> None:
        """An answer that is not 200 is none: `/health` says 503 in good order."""
        method, params = said.get("method"), said.get("params", {})
        from_network = params.get("entry", {}).get("source") == "network"
        if (
            method in ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
            and not from_network
        ):
            self.messages.append(json.dumps(params))

    def window(self, width: int, height: int, scheme: str = "light") -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)

    def value(self, expression: str) -> object:
        said = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in said, (expression, said)
        return said["result"].get("value")

    def text(self, element: str) -> str:
        return str(self.value(f"document.getElementById({element!r})?.innerText ?? ''"))

    def shoot(self, path: Path) -> None:
        shot = self.call("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(shot["data"]))


def _pipe() -> tuple[int, int]:
    """Numbers that do not collide with those that Chromium expects."""
    ends = os.pipe()
    reads, writes = (fcntl(end, F_DUPFD_CLOEXEC, ABOVE_FD) for end in ends)
    for end in ends:
        os.close(end)
    return reads, writes


@contextmanager
def browser() -> Iterator[Browser]:
    program = tool("chromium", "chromium")
    profile = Path(tempfile.mkdtemp(prefix="chromium-"))
    window = Browser(program, profile)
    try:
        window.attach()
        yield window
    finally:
        window.close()
        shutil.rmtree(profile, ignore_errors=True)
