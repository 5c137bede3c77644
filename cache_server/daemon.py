"""The process around the server: signals, log, service manager, background."""

import contextlib
import errno
import gc
import logging
import os
import resource
import select
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cache_server import runtime
from cache_server.canary import CanaryThread
from cache_server.clock import monotonic_ms
from cache_server.config import Config
from cache_server.detection import detection
from cache_server.http import AddressError, HttpSide
from cache_server.orders import PAUSE, RESUME, Orders, StoppedEarlyError
from cache_server.probes import serves_within_s
from cache_server.server import Ending, Server
from cache_server.shm import ArenaError
from cache_server.values import OFF
from cache_server.vitals import Vitals
from cache_server.watch import Watch

log = logging.getLogger(__name__)

LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"
NOTIFY_PATIENCE_S = 1.0
EXIT_FAILED = 1
SERVING = "serving "  # and the pid: what the starter hopes to hear


class StartError(Exception):
    """The server can't run; the message says why and what to do."""


class Starter:
    """Whoever started the daemon and waits for its first word, if anybody does."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def tell(self, word: str) -> None:
        """Only once: then the descriptor is closed, and its number another file's."""
        if self._fd is not None:
            with contextlib.suppress(OSError), os.fdopen(self._fd, "w") as pipe:
                self._fd = None
                pipe.write(word)


NOBODY = Starter(None)


def run(config: Config, starter: Starter = NOBODY) -> None:
    """Serves until asked to stop."""
    os.umask(0o077)
    orders = Orders()
    _take_signals(orders, config.pause_limit)
    _raise_file_limit()
    try:
        access = runtime.Access.of_group(config.group)
        notify = ServiceManager(detection(config).process_stopped_dead_ms)
        notify.starting(serves_within_s(config))
        ending = None
        while ending is not Ending.STOPPED:
            runtime.prepare(config.runtime_dir)
            if ending is Ending.RESTART:
                signal.raise_signal(signal.SIGHUP)  # the log may have been removed along with what was served
                log.error("server: begins anew: arena or socket was removed under it")
                gc.unfreeze()  # the index that was served is full of cycles, and would stay for good
                gc.collect()
            with runtime.sole_server(config.runtime_dir, access):
                ending = _run_once(config, access, notify, orders, starter)
    except StoppedEarlyError:
        log.info("server: told to stop before it served")
    except (AddressError, runtime.RuntimeDirError, ArenaError) as error:
        raise StartError(str(error)) from error
    except OSError as error:
        raise StartError(f"dir {config.dir}: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    """What is left after all that knows a better one: somewhere in the runtime dir a call has failed."""
    where = f"{error.filename}: " if error.filename else ""
    advice = (
        "free memory in its file system"
        if error.errno in (errno.ENOSPC, errno.EDQUOT)
        else "see what lies there and who may use it"
    )
    return f"{where}{error.strerror or error}: {advice}, or choose another --dir"


def _run_once(
    config: Config, access: runtime.Access, notify: "ServiceManager", orders: Orders, starter: Starter
) -> Ending:
    with contextlib.ExitStack() as open_things:
        http = None
        if config.http != OFF:  # first: a start that is refused for its port has touched nothing else
            http = open_things.enter_context(contextlib.closing(HttpSide(config.http)))
        vitals = open_things.enter_context(contextlib.closing(Vitals(config)))
        access.open_file(vitals.page.path)
        canary = CanaryThread(vitals.canary, monotonic_ms, vitals.faults)
        watch = Watch(config, vitals, canary, monotonic_ms)
        watch.alive = notify.alive
        open_things.callback(watch.stop)
        if http is not None:
            http.start(watch)
        watch.start()
        server = open_things.enter_context(contextlib.closing(Server(config, access, vitals, orders)))
        watch.source = lambda: server.published
        if config.arena:
            runtime.note_arena(config.runtime_dir, config.arena_path, access)
        starter.tell(f"{SERVING}{os.getpid()}")
        notify.ready(f"serving {config.dir}")
        ending = server.run()
        if ending is Ending.STOPPED:  # of one that begins anew systemd would wait for the end
            notify.say("STOPPING=1")
        return ending


def run_in_background(config: Config) -> int:
    """-> the daemon's pid, once it serves; raises `StartError` with its reason if it can't."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _become_daemon(config, Starter(writer))
    os.close(writer)
    os.waitpid(child, 0)
    patience_s = serves_within_s(config)
    with os.fdopen(reader) as pipe:
        if not select.select([pipe], [], [], patience_s)[0]:
            raise StartError(
                f"the daemon has not begun to serve within {patience_s} s (its log: {config.log_path})"
            )
        said = pipe.read()
    if not said.startswith(SERVING):
        raise StartError(f"{said or 'the daemon ended at its start'} (its log: {config.log_path})")
    return int(said.removeprefix(SERVING))


def _become_daemon(config: Config, starter: Starter) -> NoReturn:
    status = EXIT_FAILED
    try:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        runtime.prepare(config.runtime_dir)
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
        log_to_file(config.log_path, config.log_level)
        run(config, starter)
        status = 0
    except (StartError, runtime.RuntimeDirError) as error:
        log.error("server: %s", error)  # noqa: TRY400  the reason is the message
        starter.tell(str(error))
    except BaseException as error:  # the process ends here: nobody else would tell of it
        log.exception("server: ended by a bug")
        starter.tell(f"{type(error).__name__}: {error}")
    finally:
        os._exit(status)


def log_to_stderr(level: str) -> None:
    """SIGHUP has nothing to open anew then, and must not end the server."""
    logging.basicConfig(level=level.upper(), format=LOG_FORMAT, stream=sys.stderr)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def log_to_file(path: Path, level: str) -> None:
    """Everything the process prints goes there; SIGHUP opens the path anew, for log rotation."""

    def reopen(_signal: int, _frame: FrameType | None) -> None:
        try:
            _print_to(path)
        except OSError as error:
            log.error("log: goes on in the old file: %s can't be opened anew: %s", path, error.strerror)  # noqa: TRY400

    try:
        _print_to(path)
    except OSError as error:
        raise StartError(f"log_file = {str(path)!r}: {error.strerror}: choose another --log-file") from error
    log_to_stderr(level)
    signal.signal(signal.SIGHUP, reopen)


def _print_to(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _take_signals(orders: Orders, pause_limit_ms: int) -> None:
    """Before there is a server, and for all that come after it: as process 1 it would not even be ended."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        orders.stop()

    def pause(_signal: int, _frame: FrameType | None) -> None:
        orders.pause_until_ms = monotonic_ms() + pause_limit_ms

    def resume(_signal: int, _frame: FrameType | None) -> None:
        orders.pause_until_ms = 0

    signal.signal(PAUSE, pause)
    signal.signal(RESUME, resume)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def _raise_file_limit() -> None:
    """Each client costs a descriptor; the soft limit is often 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class ServiceManager:
    """What systemd wants to hear (sd_notify); silent without it."""

    def __init__(self, silence_ms: int) -> None:
        """`silence_ms`: after so long without a word of life the process may be ended."""
        address = os.environ.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watched = "WATCHDOG_USEC" in os.environ
        self._silence_ms = silence_ms
        self._told_ready = False

    def starting(self, within_s: int) -> None:
        """The unit file grants a start the time that the default options may take."""
        self.say(f"EXTEND_TIMEOUT_USEC={within_s * 1_000_000}")

    def ready(self, status: str) -> None:
        lines = ["READY=1", f"MAINPID={os.getpid()}", f"STATUS={status}"]
        if self._watched:  # it grants that by the default options too
            lines.append(f"WATCHDOG_USEC={self._silence_ms * 1_000}")
        self.say("\n".join(lines))
        self._told_ready = True

    def alive(self) -> None:
        if self._watched and self._told_ready:  # from then on also while it begins anew
            self.say("WATCHDOG=1", patience_s=0)  # who tells it must not wait for its reader

    def say(self, text: str, patience_s: float = NOTIFY_PATIENCE_S) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to_manager:
            to_manager.settimeout(patience_s)
            to_manager.connect(self._address)
            to_manager.send(text.encode())
