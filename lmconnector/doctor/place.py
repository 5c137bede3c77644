"""The runtime dir and its socket, as the file system shows them."""

import contextlib
import os
import pwd
import socket
import stat
from pathlib import Path

from cache_server.protocol.pid_file import read_pid
from cache_server.protocol.presence import LOCKS, PID, SOCKET
from lmconnector.doctor.findings import Finding, fail, ok, warn
from lmconnector.errors import ONE_USER

CONNECT_S = 1.0
START = "start one: cache-server run --daemon --dir {}"


def runtime_dir(path: Path) -> Finding:
    check = "runtime dir"
    try:
        status = path.stat()
    except FileNotFoundError:
        return fail(check, f"{path} does not exist: no server runs there", START.format(path))
    except OSError as error:
        return fail(check, f"{path}: {error.strerror}", "run as the server's user, or give --dir")
    mode = stat.S_IMODE(status.st_mode)
    owner = _user(status.st_uid)
    seen = f"{path}: of user {owner}, mode {mode:04o}"
    if not stat.S_ISDIR(status.st_mode):
        return fail(check, f"{path} is no directory", "give the server and the engines another dir")
    for place in (path, path / LOCKS):
        if not os.access(place, os.R_OK | os.W_OK | os.X_OK, effective_ids=True):
            return fail(
                check,
                f"{seen}; user {_user(os.geteuid())} may not use {place if place.exists() else path}",
                ONE_USER,
            )
    if mode & 0o007:
        return warn(
            check,
            f"{seen}: every user of this machine can harm the cache",
            f"chmod 700 {path} (0700 is the default)",
        )
    group = status.st_uid != os.geteuid() or mode & 0o070
    return ok(check, seen + (": open to its group" if group else ": yours alone"))


def server_socket(path: Path) -> Finding:
    """Whether somebody listens; who it is shows when it is asked something."""
    check, file = "socket", path / SOCKET
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(CONNECT_S)
        try:
            probe.connect(str(file))
        except FileNotFoundError:
            return fail(check, f"{file} does not exist: no server runs there", START.format(path))
        except ConnectionRefusedError:
            return fail(check, f"{file}: nobody listens, its server is dead", START.format(path))
        except TimeoutError:
            return fail(check, f"{file}: no connection within {CONNECT_S:.0f} s", restart(path))
        except OSError as error:
            advice = f"remove it, then {START.format(path)}"
            if isinstance(error, PermissionError):
                advice = ONE_USER
            return fail(check, f"{file}: {error.strerror or error}", advice)
    return ok(check, f"{file}: somebody listens")


def restart(path: Path) -> str:
    """What to do about a server that does not answer, as far as its process can be seen from here."""
    with contextlib.suppress(OSError, ValueError):
        server = read_pid(path / PID)
        if server.is_stopped:
            return f"process {server.pid} is stopped: kill -CONT {server.pid} lets it go on"
        if server.counts_here:
            return f"restart process {server.pid} (kill -9 if it must be): what it holds is kept"
    return f"restart it: cache-server stop --dir {path}, or kill it; what it holds is kept"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
