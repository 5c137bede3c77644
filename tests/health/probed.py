"""A real server process with its pages, its exec probe and its faults on demand, for tests."""

import contextlib
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cache_server.faults import SWITCH
from processes import ServerProcess, eventually, short_dir

LATE_MS, STALL_MS = 1_000, 3_000
QUICK = (
    "--late-after",
    f"{LATE_MS}ms",
    "--stall-after",
    f"{STALL_MS}ms",
    "--canary-idle",
    "3s",
    "--canary-deadline",
    "1s",
)
SLACK_S = 6.0  # a busy machine's, on top of a bound


@dataclass
class Probed:
    process: ServerProcess
    address: str

    def get(self, path: str, timeout_s: float = 10.0) -> tuple[int, dict]:
        try:
            answer = urllib.request.urlopen(f"http://{self.address}{path}", timeout=timeout_s)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            assert answer.headers["Content-Type"] == "application/json", path
            assert answer.headers["Cache-Control"] == "no-store", path
            return answer.status, json.load(answer)

    def metrics(self) -> dict[str, float]:
        """By name and labels, as they are written."""
        with urllib.request.urlopen(f"http://{self.address}/metrics", timeout=10) as page:
            lines = page.read().decode().splitlines()
        samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name: float(value) for name, _, value in samples}

    def becomes(self, path: str, code: int, deadline_s: float = 30.0) -> dict:
        eventually(lambda: self.get(path)[0] == code, f"{path} {code}", deadline_s)
        return self.get(path)[1]

    def check(self, probe: str) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "cache_server",
            "check",
            f"--{probe}",
            "--dir",
            str(self.process.runtime_dir),
        ]
        return subprocess.run(
            [*command, "--capacity", "64MiB"], text=True, capture_output=True, timeout=60, check=False
        )

    def fault(self, part: str, order: str) -> None:
        file = self.process.runtime_dir / f".{part}"
        file.write_text(order)
        file.rename(self.process.runtime_dir / f"fault.{part}")

    def tell(self, verb: str, *options: str) -> None:
        command = [sys.executable, "-m", "cache_server", verb, "--dir", str(self.process.runtime_dir)]
        subprocess.run([*command, "--capacity", "64MiB", *options], timeout=60, check=True)

    def heeded(self, part: str, order: str) -> None:
        """The fault has begun."""
        self.fault(part, order)
        file = self.process.runtime_dir / f"fault.{part}"
        eventually(lambda: not file.exists(), f"{file.name} heeded", 20)

    def logged(self, words: str) -> int:
        return self.process.log.read_text().count(words)

    @property
    def transitions(self) -> list[tuple[str, str]]:
        return [(event["from"], event["to"]) for event in reversed(self.get("/health/events")[1]["events"])]


@contextlib.contextmanager
def probed(
    *options: str, directory: Path | None = None, wait: bool = True, **environment: str
) -> Iterator[Probed]:
    with contextlib.ExitStack() as stack:
        runtime_dir = directory or stack.enter_context(short_dir())
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        process = ServerProcess(
            runtime_dir, "--http", address, *options, environment={SWITCH: "1", **environment}
        )
        stack.callback(process.kill)
        if wait:
            stack.enter_context(process)
            server = Probed(process, address)
            server.becomes("/ready", 200)
        else:
            process.launch()
            server = Probed(process, address)
        yield server
        process.kill()
        process.log.unlink(missing_ok=True)
