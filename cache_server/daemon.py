"""The process around the server: signals, log, service manager, background."""

import contextlib
import logging
import os
import resource
import select
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

from cache_server import runtime
from cache_server.config import OFF, Config
from cache_server.http import HttpSide
from cache_server.protocol.presence import ARENA, LOG
from cache_server.server import Ending, Server
from cache_server.shm import ArenaError

log = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
START_DEADLINE_S = 60.0
EXIT_FAILED = 1


class StartError(Exception):
    """The server can't run; the message says why and what to do."""


def run(config: Config, ready_fd: int | None = None) -> None:
    """Serves until asked to stop.  Writes one line to `ready_fd` when it does: nothing, or why it can't."""
    os.umask(0o077)
    _raise_file_limit()
    try:
        access = runtime.Access.of_group(config.group)
        runtime.prepare(config.runtime_dir, access)
        ending = Ending.RESTART
        while ending is Ending.RESTART:
            runtime.prepare(config.runtime_dir, access)
            with runtime.sole_server(config.runtime_dir):
                ending = _run_once(config, access, ready_fd)
                ready_fd = None
    except (runtime.RuntimeDirError, ArenaError, OSError) as error:
        raise StartError(str(error)) from error


def _run_once(config: Config, access: runtime.Access, ready_fd: int | None) -> Ending:
    with contextlib.ExitStack() as open_things:
        http = None
        if config.http != OFF:  # first: a start that is refused for its port has touched nothing else
            http = open_things.enter_context(contextlib.closing(HttpSide(config.http)))
        server = open_things.enter_context(contextlib.closing(Server(config, access)))
        if http is not None:
            http.start(lambda: server.snapshot)
        _take_signals(server)
        if ready_fd is not None:
            os.write(ready_fd, b"\n")
            os.close(ready_fd)
        notify = ServiceManager()
        notify.say(f"READY=1\nMAINPID={os.getpid()}\nSTATUS=serving {config.dir}")
        ending = server.run(notify.alive)
        notify.say("STOPPING=1")
        return ending


def run_in_background(config: Config) -> int:
    """-> the daemon's pid, once it serves; raises `StartError` with its reason if it can't."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _become_daemon(config, writer)
    os.close(writer)
    os.waitpid(child, 0)
    if not select.select([reader], [], [], START_DEADLINE_S)[0]:
        raise StartError(f"the daemon has not begun to serve within {START_DEADLINE_S:.0f} s; see its log")
    said = os.read(reader, 4096)
    if said != b"\n":
        raise StartError(said.decode().strip() or "the daemon ended at its start; see its log")
    pid = runtime.running_pid(config.runtime_dir)
    assert pid is not None, "it said that it serves"
    return pid


def _become_daemon(config: Config, ready_fd: int) -> None:
    os.setsid()
    if os.fork():
        os._exit(0)
    status = EXIT_FAILED
    try:
        os.chdir("/")
        config.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        log_to_file(log_path(config), config.log_level)
        run(config, ready_fd)
        status = 0
    except (StartError, OSError) as error:
        log.error("server: %s", error)  # noqa: TRY400  the reason is the message
        with contextlib.suppress(OSError):
            os.write(ready_fd, str(error).encode())
    finally:
        os._exit(status)


def log_path(config: Config) -> Path:
    return Path(config.log_file) if config.log_file else config.runtime_dir / LOG


def log_to_stderr(level: str) -> None:
    """SIGHUP has nothing to reopen then, and must not end the server."""
    logging.basicConfig(level=level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def log_to_file(path: Path, level: str) -> None:
    """Everything the process prints goes there; SIGHUP opens the path anew, for log rotation."""

    def reopen(_signal: int = 0, _frame: FrameType | None = None) -> None:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        os.close(fd)

    reopen()
    log_to_stderr(level)
    signal.signal(signal.SIGHUP, reopen)


def _take_signals(server: Server) -> None:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        server.stop_requests += 1

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _raise_file_limit() -> None:
    """Each client costs a descriptor; the soft limit is often 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def stop(config: Config, *, purge: bool) -> bool:
    """Drains the server and waits for its end; -> whether one was running."""
    pid = runtime.running_pid(config.runtime_dir)
    if pid is not None:
        deadline_s = config.drain / 1_000 + 10
        with contextlib.suppress(ProcessLookupError):
            process = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(process, signal.SIGTERM)
                if not select.select([process], [], [], deadline_s)[0]:
                    raise StartError(
                        f"the server (pid {pid}) has not ended within {deadline_s:.0f} s: it may hang; "
                        f"`kill -9 {pid}` loses nothing that was committed"
                    )
            finally:
                os.close(process)
    if purge:
        runtime.purge(config.runtime_dir, Path(config.arena or config.runtime_dir / ARENA))
    return pid is not None


class ServiceManager:
    """What systemd wants to hear (sd_notify); silent without it."""

    def __init__(self) -> None:
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watched = "WATCHDOG_USEC" in os.environ

    def alive(self) -> None:
        if self._watched:
            self.say("WATCHDOG=1")

    def say(self, text: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to_manager:
            to_manager.connect(self._address)
            to_manager.send(text.encode())
