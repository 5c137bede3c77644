"""Real server processes for tests: started, waited for, killed by pid, tidied away."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from cache_server.client import Client, UnreachableError
from cache_server.protocol import messages as m
from cache_server.report import Status

T = TypeVar("T")
START_DEADLINE_S = 20.0


def eventually(probe: Callable[[], T], what: str, deadline_s: float = 10.0) -> T:
    """The probe's first true answer."""
    end_s = time.monotonic() + deadline_s
    while True:
        answer = probe()
        if answer:
            return answer
        assert time.monotonic() < end_s, f"{what}: not within {deadline_s} s"
        time.sleep(0.01)


@contextlib.contextmanager
def short_dir() -> Iterator[Path]:
    """A directory in memory, with a path short enough for a socket."""
    path = Path(tempfile.mkdtemp(prefix="cs-", dir="/dev/shm"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class ServerProcess:
    def __init__(self, runtime_dir: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.runtime_dir = runtime_dir
        self.options = ["--capacity", "64MiB", "--http", "off", *options]
        self.log = runtime_dir.with_name(runtime_dir.name + ".log")
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "ServerProcess":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.log.unlink(missing_ok=True)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def launch(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "cache_server", "run", "--dir", str(self.runtime_dir), *self.options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
        return self.process

    def start(self) -> None:
        process = self.launch()
        eventually(lambda: self.answers() or process.poll() is not None, "first PONG", START_DEADLINE_S)
        assert process.poll() is None, self.log.read_text()

    def kill(self) -> None:
        """kill -9"""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
            self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def answers(self, timeout_ms: int = 50) -> bool:
        with contextlib.suppress(UnreachableError), Client(self.runtime_dir, timeout_ms) as client:
            client.ask(m.Ping(id=1), m.Pong)
            return True
        return False

    def status(self) -> Status:
        with Client(self.runtime_dir, 10_000) as client:
            reply = client.ask(m.Status(id=1, workers=True), m.StatusReply)
        return msgspec.convert(reply.status, Status)

    def populated(self) -> None:
        eventually(lambda: not self.status().arena.unpopulated_bytes, "populated", 60.0)

    def check_conservation(self) -> Status:
        status = self.status()
        arena = status.arena
        assert arena.free_bytes + arena.used_bytes + arena.quarantined_bytes == arena.capacity_bytes, arena
        return status


@contextlib.contextmanager
def server(*options: str) -> Iterator[ServerProcess]:
    with short_dir() as runtime_dir, ServerProcess(runtime_dir, *options) as process:
        process.populated()
        yield process
