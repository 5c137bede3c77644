"""Server and engine in namespaces of their own, as pods have: a directory in memory is all they share."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_server.faults import SWITCH
from processes import eventually, short_dir
from tools import lacking, tool

# As the manifests have it: a root that can't be written, no capabilities, and no way to get any.
RESTRICTED = (
    "mount --make-rprivate / && mount -o remount,bind,ro / && "
    'exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"'
)
ALONE = [
    "unshare", "--map-root-user", "--mount", "--pid", "--net", "--ipc", "--fork", "--kill-child",
    "--mount-proc", "sh", "-c", RESTRICTED, "sh",
]  # fmt: skip
pytestmark = pytest.mark.chaos


@pytest.fixture(scope="module", autouse=True)
def _namespaces() -> None:
    tool("unshare", "util-linux")
    tool("setpriv", "util-linux")
    tried = subprocess.run([*ALONE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        lacking(f"no namespaces here: {tried.stderr}")


def in_a_pod(runtime_dir: Path, *arguments: str) -> list[str]:
    return [*ALONE, sys.executable, "-m", "cache_server", *arguments, "--dir", str(runtime_dir)]


def check(runtime_dir: Path, probe: str) -> tuple[int, str]:
    done = subprocess.run(
        in_a_pod(runtime_dir, "check", f"--{probe}"), capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@contextlib.contextmanager
def serving(runtime_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = in_a_pod(runtime_dir, "run", "--capacity", "64MiB", "--http", "0.0.0.0:9470")
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            eventually(lambda: check(runtime_dir, "ready")[0] == 0, "ready", 60.0)
            yield process
        finally:
            process.kill()  # and with it, by --kill-child, the server


def child_of(process: subprocess.Popen[bytes]) -> int:
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


def test_a_whole_job_works_across_pods_and_after_a_restart() -> None:
    with short_dir() as parent:
        runtime_dir = parent / "server"
        for _ in range(2):
            with serving(runtime_dir):
                code, said = check(runtime_dir, "deep")
                assert code == 0, said
        code, said = check(runtime_dir, "live")
        assert (code, said) == (1, f"live: no server runs on {runtime_dir}\n")


def test_a_server_that_is_process_1_drains_when_it_is_told_to() -> None:
    with short_dir() as parent, serving(parent / "server") as process:
        os.kill(child_of(process), signal.SIGTERM)
        assert process.wait(60) == 0


def test_a_server_that_is_process_1_is_stopped_before_it_serves() -> None:
    """The kernel ends no process 1 by a signal that it does not handle."""
    with short_dir() as parent:
        delayed = parent / "server" / "fault.start"
        delayed.parent.mkdir(mode=0o700)
        delayed.write_text("60")
        command = in_a_pod(delayed.parent, "run", "--capacity", "64MiB", "--http", "off")
        environment = {**os.environ, SWITCH: "1"}
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment) as process:
            try:
                eventually(lambda: not delayed.exists(), "begun", 20.0)
                os.kill(child_of(process), signal.SIGTERM)
                assert process.wait(20) == 0
            finally:
                process.kill()


def test_no_pod_signals_a_process_of_its_own_that_has_the_servers_number() -> None:
    with short_dir() as parent, serving(parent / "server") as process:
        for verb in ("stop", "pause"):
            told = subprocess.run(
                in_a_pod(parent / "server", verb), capture_output=True, text=True, timeout=60, check=False
            )
            assert told.returncode == 1
            assert "is process 1 of another pid namespace" in told.stderr
            assert "run this in the server's container" in told.stderr
        assert process.poll() is None
        assert check(parent / "server", "ready")[0] == 0


def test_a_pod_can_write_nothing_but_the_volume() -> None:
    with short_dir() as volume:
        writable = [
            subprocess.run([*ALONE, "test", "-w", str(path)], check=False).returncode == 0
            for path in ("/", volume)
        ]
    assert writable == [False, True]
    status = subprocess.run([*ALONE, "cat", "/proc/self/status"], capture_output=True, text=True, check=True)
    assert "CapEff:\t0000000000000000" in status.stdout
    assert "NoNewPrivs:\t1" in status.stdout
