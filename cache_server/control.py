"""The verbs that signal a running server: stop, pause, resume."""

import contextlib
import os
import select
import signal
from pathlib import Path

from cache_server import runtime
from cache_server.config import Config
from cache_server.protocol.pid_file import ServerPid, own_namespace
from cache_server.protocol.presence import ARENA

STOP_SLACK_MS = 10_000  # beyond the drain


class ControlError(Exception):
    """The server was not told, or has not done it; the message says why and what to do."""


def stop(config: Config, *, purge: bool) -> bool:
    """Drains the server and waits for its end; -> whether one was running."""
    server = _tell(config.runtime_dir, signal.SIGTERM, wait_ms=config.drain + STOP_SLACK_MS)
    if purge:
        runtime.purge(config.runtime_dir, Path(config.arena or config.runtime_dir / ARENA))
    return server is not None


def order(config: Config, told: signal.Signals) -> None:
    if _tell(config.runtime_dir, told) is None:
        raise ControlError(f"no server runs on {config.dir}")


def _tell(runtime_dir: Path, told: signal.Signals, wait_ms: int = 0) -> ServerPid | None:
    """Sends the running server a signal and waits for its end if so told; None where no server runs."""
    server = runtime.running_server(runtime_dir)
    if server is None:
        return None
    process = _process_of(server, runtime_dir)
    if process is None:
        return None
    try:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            signal.pidfd_send_signal(process, told)
        if wait_ms and not select.select([process], [], [], wait_ms / 1_000)[0]:
            raise ControlError(
                f"the server (pid {server.pid}) has not ended within {wait_ms / 1_000:.0f} s: it may hang; "
                f"`kill -9 {server.pid}` loses nothing that was committed"
            )
    except PermissionError as error:
        raise ControlError(
            f"dir {runtime_dir}: its server (pid {server.pid}) is another user's process: "
            f"run this as that user (uid {runtime_dir.stat().st_uid}), or as root"
        ) from error
    finally:
        os.close(process)
    return server


def _process_of(server: ServerPid, runtime_dir: Path) -> int | None:
    """A descriptor, which stands for no other process that gets the number later; None if it has ended."""
    if not server.counts_here:
        raise ControlError(
            f"dir {runtime_dir}: its server is process {server.pid} of another pid namespace "
            f"({server.namespace}, this one is {own_namespace()}); here that number is another process's: "
            "run this in the server's container, or have that container stopped"
        )
    try:
        return os.pidfd_open(server.pid)
    except ProcessLookupError as error:
        if not runtime.is_served(runtime_dir):
            return None
        raise ControlError(
            f"dir {runtime_dir}: a server runs on it, but its process {server.pid} can't be seen from here: "
            "run this where the server runs, in its container say"
        ) from error
