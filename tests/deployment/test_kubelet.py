"""A kubelet that probes a real server as the computed probes say: started, served, frozen, paused."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

from cache_server.check import BAD, look
from cache_server.clock import monotonic_ms
from cache_server.config import Config, gather, parse
from cache_server.probes import probes
from processes import ServerProcess, eventually, short_dir

pytestmark = pytest.mark.chaos
OPTIONS = {"capacity": "64MiB", "late_after": "1s", "stall_after": "6s"}


class Kubelet:
    def __init__(self, probe: dict[str, Any]) -> None:
        self.probe = probe

    def asks(self) -> bool:
        if "httpGet" not in self.probe:
            command = [sys.executable, "-m", "cache_server", *self.probe["exec"]["command"][1:]]
            try:
                done = subprocess.run(
                    command, capture_output=True, check=False, timeout=self.probe["timeoutSeconds"]
                )
                return done.returncode == 0
            except subprocess.TimeoutExpired:
                return False
        asked = self.probe["httpGet"]
        url = f"http://127.0.0.1:{asked['port']}{asked['path']}"
        try:
            with urllib.request.urlopen(url, timeout=self.probe["timeoutSeconds"]) as answer:
                return 200 <= answer.status < 400
        except (urllib.error.HTTPError, OSError) as error:
            if isinstance(error, urllib.error.HTTPError):
                error.close()
            return False

    def gives_up(self) -> None:
        """Returns at the last failure that it takes."""
        failures = 0
        while failures < self.probe["failureThreshold"]:
            began_s = time.monotonic()
            failures = 0 if self.asks() else failures + 1
            if failures < self.probe["failureThreshold"]:
                time.sleep(max(0.0, self.probe["periodSeconds"] - (time.monotonic() - began_s)))


@pytest.fixture
def running(request: pytest.FixtureRequest) -> Iterator[tuple[ServerProcess, dict[str, Kubelet], Config]]:
    by_exec: bool = request.param
    with short_dir() as parent:
        runtime_dir = parent / "server"
        flags = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", value)]
        with ServerProcess(runtime_dir, *flags, "--http", "127.0.0.1:0") as server:
            [port] = re.findall(r"listening on port (\d+)", server.log.read_text())
            config = parse(gather({**OPTIONS, "dir": str(runtime_dir), "http": f"0.0.0.0:{port}"}, {}, None))
            asked = {name: Kubelet(probe) for name, probe in probes(config, by_exec=by_exec).items()}
            yield server, asked, config


@pytest.mark.parametrize("running", [False, True], ids=["http", "exec"], indirect=True)
def test_a_server_is_started_ready_and_given_up_only_when_it_is_stalled_by_its_own_rules(
    running: tuple[ServerProcess, dict[str, Kubelet], Config],
) -> None:
    server, kubelet, config = running
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        eventually(kubelet[name].asks, name, 60.0)
    os.kill(server.pid, signal.SIGSTOP)
    kubelet["livenessProbe"].gives_up()
    assert look(config, "live", monotonic_ms()).exit_code == BAD
    os.kill(server.pid, signal.SIGCONT)
    eventually(kubelet["livenessProbe"].asks, "live again", 60.0)


@pytest.mark.parametrize("running", [False], ids=["http"], indirect=True)
def test_a_paused_server_is_not_ready_and_not_given_up(
    running: tuple[ServerProcess, dict[str, Kubelet], Config],
) -> None:
    server, kubelet, _ = running
    eventually(kubelet["readinessProbe"].asks, "ready", 60.0)
    os.kill(server.pid, signal.SIGUSR1)
    eventually(lambda: not kubelet["readinessProbe"].asks(), "paused", 60.0)
    assert kubelet["livenessProbe"].asks()
    assert kubelet["startupProbe"].asks()
