"""The verbs that signal a server reach that process and no other, or say why they can't."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from cache_server.config import Config, gather, parse
from cache_server.control import ControlError, order, stop
from cache_server.orders import PAUSE
from cache_server.protocol.pid_file import ServerPid
from cache_server.protocol.presence import PID
from cache_server.runtime import Access, CannotTellError, prepare, running_server, sole_server
from nobody import NOBODY, only_root
from processes import short_dir

SERVER = """
import signal, sys
from pathlib import Path
from cache_server.runtime import Access, sole_server
with sole_server(Path(sys.argv[1]), Access(None)):
    print("serving", flush=True)
    got = signal.sigwait({signal.SIGTERM, signal.SIGUSR1} if sys.argv[2] == "ends" else {signal.SIGUSR2})
    print(got.name)
"""
BLOCKED = {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}


@pytest.fixture
def config() -> Iterator[Config]:
    with short_dir() as parent:
        config = parse(gather({"dir": str(parent / "run"), "drain": "0s"}, {}, None))
        prepare(config.runtime_dir)
        yield config


@contextlib.contextmanager
def serving(config: Config, *, ends: bool = True) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the runtime dir and tells the signal that ends it."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)  # it inherits that, and so can wait for them
    try:
        command = [sys.executable, "-c", SERVER, config.dir, "ends" if ends else "hangs"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        try:
            yield process
        finally:
            process.kill()


def said(process: subprocess.Popen[str]) -> str:
    return process.communicate(timeout=20)[0].strip()


def test_a_stop_waits_for_the_end(config: Config) -> None:
    with serving(config) as process:
        assert stop(config)
        assert said(process) == "SIGTERM"
    assert not stop(config), "there is none, and that is what was wanted"


def test_an_order_reaches_the_server(config: Config) -> None:
    with serving(config) as process:
        order(config, PAUSE)
        assert said(process) == PAUSE.name
    with pytest.raises(ControlError, match=f"no server runs on {config.dir}"):
        order(config, PAUSE)


def test_a_server_that_hangs_is_named_and_keeps_its_files(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cache_server.control.PATIENCE_S", 0.1)
    monkeypatch.setattr("cache_server.control.LOOK_S", 0.1)
    with serving(config, ends=False) as process:
        with pytest.raises(
            ControlError, match=rf"pid {process.pid}\) has not ended .* `kill -9 {process.pid}`"
        ):
            stop(config)
        assert running_server(config.runtime_dir) is not None


def test_no_signal_goes_to_another_pid_namespace(config: Config) -> None:
    """There the number is another process's: here, of all processes, our own."""
    with sole_server(config.runtime_dir, Access(None)):
        (config.runtime_dir / PID).write_text(ServerPid(os.getpid(), "pid:[1]").text)
        with pytest.raises(ControlError, match=rf"{os.getpid()} of another pid namespace \(pid:\[1\], this"):
            stop(config)
        assert running_server(config.runtime_dir) is not None


def test_a_process_that_can_not_be_seen_is_named(config: Config) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with sole_server(config.runtime_dir, Access(None)):
        (config.runtime_dir / PID).write_text(f"{gone.pid}\n")
        with pytest.raises(
            ControlError, match=rf"its process {gone.pid} can't be seen from here: run this where"
        ):
            stop(config)


def test_a_server_without_a_pid_is_not_taken_for_none(config: Config) -> None:
    with sole_server(config.runtime_dir, Access(None)):
        (config.runtime_dir / PID).unlink()
        with pytest.raises(CannotTellError):
            stop(config)
        with pytest.raises(CannotTellError):
            order(config, PAUSE)


def raised_for_somebody_else(call: Callable[[], object]) -> str:
    """By a process of another user."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            call()
        except (ControlError, CannotTellError) as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as told:
        return told.read()


@only_root
def test_who_may_not_signal_is_told_who_may(config: Config) -> None:
    with serving(config) as process:
        for path in (config.runtime_dir.parent, config.runtime_dir):
            path.chmod(0o755)
        (config.runtime_dir / PID).chmod(0o644)
        for call in (lambda: stop(config), lambda: order(config, PAUSE)):
            assert raised_for_somebody_else(call) == (
                f"ControlError: dir {config.dir}: its server (pid {process.pid}) is another user's process: "
                "run this as that user (uid 0), or as root"
            )


def test_the_command_tells_a_failure_from_what_it_can_not_tell(config: Config) -> None:
    def command(verb: str) -> tuple[int, str]:
        told = subprocess.run(
            [sys.executable, "-m", "cache_server", verb, "--dir", config.dir],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return told.returncode, told.stderr

    assert command("pause") == (1, f"cache-server: no server runs on {config.dir}\n")
    with sole_server(config.runtime_dir, Access(None)):
        (config.runtime_dir / PID).unlink()
        code, words = command("stop")
        assert code == 2
        assert words.startswith(f"cache-server: dir {config.dir}: a server runs on it, but not which process")
