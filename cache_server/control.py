"""The verbs that signal a running server: stop, pause, resume."""

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

from cache_server import runtime
from cache_server.client import Client, RefusedError, UnreachableError
from cache_server.config import DRAIN_MS_MAX, Config
from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError
from cache_server.protocol.pid_file import ServerPid, own_namespace

PATIENCE_S = 10.0  # with a server that does not say that it drains
LOOK_S = 1.0


class ControlError(Exception):
    """The server was not told, or has not done it; the message says why and what to do."""


def stop(config: Config) -> bool:
    """Drains the server and waits for its end; -> whether one was running."""
    return _tell(config.runtime_dir, signal.SIGTERM, wait=True)


def order(config: Config, told: signal.Signals) -> None:
    if not _tell(config.runtime_dir, told):
        raise ControlError(f"no server runs on {config.dir}")


def _tell(runtime_dir: Path, told: signal.Signals, *, wait: bool = False) -> bool:
    """Sends the running server a signal and waits for its end if so told; -> whether one was running."""
    server = runtime.running_server(runtime_dir)
    if server is None:
        return False
    process = _process_of(server, runtime_dir)
    if process is None:
        return False
    try:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            signal.pidfd_send_signal(process, told)
        if wait:
            _await_end(process, server, runtime_dir)
    except PermissionError as error:
        raise ControlError(
            f"dir {runtime_dir}: its server (pid {server.pid}) is another user's process: "
            f"run this as that user (uid {runtime_dir.stat().st_uid}), or as root"
        ) from error
    finally:
        os.close(process)
    return True


def _await_end(process: int, server: ServerPid, runtime_dir: Path) -> None:
    """For as long as the server says that it drains: how long it may is for its configuration to say."""
    began_s = heard_s = time.monotonic()
    while not select.select([process], [], [], LOOK_S)[0]:
        now_s = time.monotonic()
        if server.is_stopped:
            raise ControlError(
                f"the server (pid {server.pid}) is stopped: `kill -CONT {server.pid}` lets it go on, and end"
            )
        if now_s - began_s < DRAIN_MS_MAX / 1_000 and _drains(runtime_dir):
            if heard_s == began_s:
                print(f"the server (pid {server.pid}) drains, and is waited for", file=sys.stderr)
            heard_s = now_s
        elif now_s - heard_s > PATIENCE_S and not select.select([process], [], [], 0)[0]:
            raise ControlError(
                f"the server (pid {server.pid}) has not ended within {now_s - began_s:.0f} s: it may hang; "
                f"`kill -9 {server.pid}` loses nothing that was committed"
            )


def _drains(runtime_dir: Path) -> bool:
    with Client(runtime_dir) as client, contextlib.suppress(UnreachableError, RefusedError, ProtocolError):
        return client.ask(m.Ping(id=client.next_id()), m.Pong).state == "draining"
    return False


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
