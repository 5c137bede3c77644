"""The runtime dir on the server's side: made, guarded against a second server, tidied away."""

import contextlib
import fcntl
import grp
import os
import secrets
import select
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cache_server.protocol.presence import ARENA, LOCKS, LOG, PID, SOCKET, TOKEN, lock_now

LOCK_TRIES = 20
LOCK_PAUSE_S = 0.01


class RuntimeDirError(Exception):
    """The runtime dir can't be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Access:
    """Who may open what lies in the runtime dir: its user alone or, with `gid`, one group too."""

    gid: int | None

    @classmethod
    def of_group(cls, name: str) -> "Access":
        if not name:
            return cls(None)
        try:
            return cls(grp.getgrnam(name).gr_gid)
        except KeyError as error:
            raise RuntimeDirError(f"group = {name!r}: this machine has no such group") from error

    @property
    def file_mode(self) -> int:
        return 0o600 if self.gid is None else 0o660

    @property
    def dir_mode(self) -> int:
        return 0o700 if self.gid is None else 0o2770

    def open_dir(self, path: Path) -> None:
        self._grant(path, self.dir_mode)

    def open_file(self, path: Path) -> None:
        self._grant(path, self.file_mode)

    def _grant(self, path: Path, mode: int) -> None:
        if self.gid is not None:
            os.chown(path, -1, self.gid)
        path.chmod(mode)


def prepare(path: Path, access: Access) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.stat().st_uid != os.geteuid():
            raise RuntimeDirError(f"dir {path} belongs to another user: choose another --dir")
        access.open_dir(path)
        (path / LOCKS).mkdir(mode=0o700, exist_ok=True)
        access.open_dir(path / LOCKS)
    except OSError as error:
        raise RuntimeDirError(
            f"dir {path}: {error.strerror}: choose another --dir or its permissions"
        ) from error


@contextlib.contextmanager
def sole_server(path: Path) -> Iterator[None]:
    """Holds the lock that makes this process the runtime dir's only server.  It lies on the directory itself:
    a file in it could be taken for stale and removed."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not _lock_soon(fd):
            raise RuntimeDirError(
                f"dir {path}: a server (pid {read_pid(path)}) already runs on it: "
                "stop it with `cache-server stop`, or choose another --dir"
            )
        (path / PID).write_text(f"{os.getpid()}\n")
        yield
        (path / PID).unlink(missing_ok=True)
    finally:
        os.close(fd)


def _lock_soon(fd: int) -> bool:
    """`running_pid` holds the lock for an instant; a server holds it for good."""
    for _ in range(LOCK_TRIES):
        if lock_now(fd):
            return True
        select.select([], [], [], LOCK_PAUSE_S)
    return False


def read_pid(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        return int((path / PID).read_text())
    return None


def running_pid(path: Path) -> int | None:
    """The pid of the server that runs on this dir now, as its lock proves."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if lock_now(fd):
            fcntl.flock(fd, fcntl.LOCK_UN)
            return None
        return read_pid(path)
    finally:
        os.close(fd)


def admin_token(path: Path) -> str:
    """Kept over restarts, so that an operator's tools go on working."""
    file = path / TOKEN
    with contextlib.suppress(FileNotFoundError):
        if stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 and (token := file.read_text().strip()):
            return token
    token = secrets.token_hex(16)
    file.unlink(missing_ok=True)
    fd = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as opened:
        opened.write(token + "\n")
    return token


def purge(path: Path, arena: Path) -> None:
    """Removes all that a server leaves behind, and the dir itself if nothing else lies in it."""
    for name in (SOCKET, ARENA, f"{ARENA}.new", TOKEN, LOG, PID):
        (path / name).unlink(missing_ok=True)
    arena.unlink(missing_ok=True)
    shutil.rmtree(path / LOCKS, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rmdir()
