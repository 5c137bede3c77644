"""The runtime dir on the server's side: made, guarded against a second server, tidied away."""

import contextlib
import fcntl
import grp
import os
import secrets
import select
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cache_server.faults import FAULT
from cache_server.protocol.pid_file import ServerPid, read_pid
from cache_server.protocol.presence import (
    ARENA,
    ARENA_PATH,
    BEAT,
    CANARY_LOCK,
    DIRECTORY,
    HOLDS,
    HOLDS_LOCK,
    LOCKS,
    LOG,
    PID,
    SOCKET,
    TOKEN,
    is_file_at,
    lock_now,
)
from cache_server.shm import free_pages, is_arena

LOCK_TRIES = 20
LOCK_PAUSE_S = 0.01
NAMED_MAX = 3  # of files that are in the way
FILES = (
    SOCKET, f"{ARENA}.new", ARENA_PATH, f"{ARENA_PATH}.new", TOKEN, LOG, PID, f"{PID}.new", BEAT,
    f"{BEAT}.new", CANARY_LOCK, HOLDS, f"{HOLDS}.new", HOLDS_LOCK,
)  # fmt: skip


class RuntimeDirError(Exception):
    """The runtime dir can't be used; the message says why and what to do."""


class CannotTellError(RuntimeDirError):
    """Whether a server runs on the dir, or which process it is."""


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


def prepare(path: Path) -> None:
    """There is a directory then that a server may have; another one's is as it was."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        whose = path.stat()
        if whose.st_uid != os.geteuid():
            raise RuntimeDirError(f"dir {path} belongs to another user: choose another --dir")
        if whose.st_mode & stat.S_ISVTX:
            raise RuntimeDirError(
                f"dir {path} is shared by all users: choose one of its own, {path}/cache-server"
            )
        if strange := _strange_files(path):
            raise RuntimeDirError(
                f"dir {path} has files that are no cache server's ({_some(strange)}): choose an empty --dir"
            )
    except OSError as error:
        raise _unusable(path, error) from error


def _strange_files(path: Path) -> list[str]:
    """That somebody else had before a server made itself at home there; it is not to be taken from him."""
    names = sorted(os.listdir(path))
    if LOCKS in names and TOKEN in names:
        return []
    return [name for name in names if name not in (*FILES, ARENA, LOCKS) and not name.startswith(FAULT)]


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED_MAX]) + (f" and {len(names) - NAMED_MAX} more" if names[NAMED_MAX:] else "")


def _unusable(path: Path, error: OSError) -> RuntimeDirError:
    return RuntimeDirError(f"dir {path}: {error.strerror}: choose another --dir or its permissions")


@contextlib.contextmanager
def sole_server(path: Path, access: Access) -> Iterator[None]:
    """Holds the lock that makes this process the runtime dir's only server, and says which process it is."""
    advice = "stop it with `cache-server stop`, or choose another --dir"
    with _alone(path, advice) as in_place:
        _open_to(path, access)
        _write(path / PID, ServerPid.own().text, access)
        try:
            yield
        finally:
            if in_place():  # else it may be the next one's
                (path / PID).unlink(missing_ok=True)


def _open_to(path: Path, access: Access) -> None:
    """To whom the configuration opens it, and to nobody else."""
    try:
        access.open_dir(path)
        (path / LOCKS).mkdir(mode=0o700, exist_ok=True)
        access.open_dir(path / LOCKS)
    except PermissionError as error:
        if access.gid is None:
            raise _unusable(path, error) from error
        group = grp.getgrgid(access.gid).gr_name
        words = f"group = {group!r}: {error.strerror}: choose a group that this user is a member of"
        raise RuntimeDirError(words) from error


def _write(file: Path, text: str, access: Access) -> None:
    unfinished = file.with_name(f"{file.name}.new")
    unfinished.write_text(text)
    access.open_file(unfinished)
    unfinished.rename(file)


def note_arena(path: Path, arena: Path, access: Access) -> None:
    """So that a purge finds it, whoever runs that with whatever options."""
    _write(path / ARENA_PATH, f"{arena}\n", access)


@contextlib.contextmanager
def _alone(path: Path, advice: str) -> Iterator[Callable[[], bool]]:
    """The lock lies on the directory itself: a file in it could be taken for stale and removed."""
    fd = os.open(path, DIRECTORY)
    try:
        if not _lock_soon(fd):
            raise RuntimeDirError(f"dir {path}: a server{_pid_of(path)} already runs on it: {advice}")
        in_place = partial(is_file_at, path, os.fstat(fd))
        if not in_place():
            raise RuntimeDirError(f"dir {path}: it was removed at this moment: try again")
        yield in_place
    finally:
        os.close(fd)


def _lock_soon(fd: int) -> bool:
    """Who asks whether a server runs holds the lock for an instant; a server holds it for good."""
    for _ in range(LOCK_TRIES):
        if lock_now(fd):
            return True
        select.select([], [], [], LOCK_PAUSE_S)
    return False


def _pid_of(path: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        return f" (pid {read_pid(path / PID).pid})"
    return ""


def is_served(path: Path) -> bool:
    """Whether a server runs on this dir now, as its lock proves."""
    try:
        fd = os.open(path, DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise CannotTellError(
            f"dir {path}: {error.strerror}: can't tell whether a server runs on it: "
            "run this as the user of the server, or as a member of its `group`"
        ) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: who asks is no server to who asks as well
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def running_server(path: Path) -> ServerPid | None:
    """The process that serves this dir now; None where there is none."""
    if not is_served(path):
        return None
    try:
        return read_pid(path / PID)
    except (OSError, ValueError) as error:
        raise CannotTellError(
            f"dir {path}: a server runs on it, but not which process it is can be told: {error}: "
            f"`cache-server status` knows its pid, and so does `fuser {path}`; `kill -TERM` stops it"
        ) from error


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


def purge(path: Path, arena: Path | None) -> list[Path]:
    """Removes all that a server leaves behind, and the dir itself if nothing else lies in it; -> the arenas
    and the dir, if they are removed.  `arena`: one that may not be noted there."""
    removed = []
    try:
        with contextlib.ExitStack() as alone:
            if path.is_dir():
                if strange := _strange_files(path):
                    words = f"has files that are no cache server's ({_some(strange)}): nothing was removed"
                    raise RuntimeDirError(f"dir {path} {words}")
                advice = "nothing was removed; if a service manager has started it again, stop it there"
                alone.enter_context(_alone(path, advice))
            arenas = dict.fromkeys([path / ARENA, *_noted_arena(path), *([arena] if arena else [])])
            removed += [each for each in arenas if _remove_arena(each)]
            for name in FILES:
                (path / name).unlink(missing_ok=True)
            shutil.rmtree(path / LOCKS, ignore_errors=True)
            with contextlib.suppress(OSError):
                path.rmdir()
                removed.append(path)
    except OSError as error:
        raise RuntimeDirError(
            f"{error.filename}: {error.strerror}: it can't be removed: run this as the user of the server"
        ) from error
    return removed


def _noted_arena(path: Path) -> list[Path]:
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        if noted := (path / ARENA_PATH).read_text().strip():
            return [Path(noted)]
    return []


def _remove_arena(path: Path) -> bool:
    """-> whether there was one"""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        if not lock_now(fd):
            raise RuntimeDirError(f"arena {path}: it was not removed: a server with another --dir uses it")
        if not is_arena(fd):
            raise RuntimeDirError(f"arena {path}: it was not removed: the file is no arena, and somebody's")
        free_pages(fd)
        path.unlink()
    finally:
        os.close(fd)
    return True
