"""The runtime dir's file names, and the proof that a process lives.

Every engine process holds one file of its own under `locks/` locked (`flock`) for as long as it may touch the
arena.  The kernel lets go of the lock when the process is dead, however it died and in whichever container:
so a lock that can be taken proves that nobody writes any more.  Silence is no proof, nor is a missing file.
"""

import contextlib
import errno
import fcntl
import os
import secrets
from pathlib import Path

from cache_server.protocol.keys import owner_of

SOCKET = "server.sock"
PID = "server.pid"
ARENA = "arena"
ARENA_PATH = "arena.path"  # what is in it: where the arena really is
LOCKS = "locks"
TOKEN = "token"  # noqa: S105
LOG = "server.log"
BEAT = "beat"
CANARY_LOCK = "canary.lock"
HOLDS = "holds"
HOLDS_LOCK = "holds.lock"
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC  # opened for its own sake
NAMES_MAX = 8  # tried for a presence file
SOCKET_PATH_BYTES_MAX = 107  # of a unix socket's address


def why_no_socket(runtime_dir: Path) -> str:
    """In words; empty where one can lie."""
    size = len(os.fsencode(runtime_dir / SOCKET))
    if size <= SOCKET_PATH_BYTES_MAX:
        return ""
    return (
        f"the socket's path would have {size} bytes, a unix socket takes {SOCKET_PATH_BYTES_MAX}: "
        "choose a shorter one"
    )


def presence_name(engine: str) -> str:
    """Another one for every life, so that no process is taken for its predecessor."""
    return f"{owner_of(engine).hex()}.{os.getpid()}.{secrets.token_hex(4)}"


class Presence:
    """Held by the process itself, from before it registers until it has stopped touching the arena."""

    def __init__(self, runtime_dir: Path, name: str) -> None:
        """The server may take the file, which nobody holds yet, for a dead process's, and remove it: then
        another name is tried.  The lock is not waited for: a server may be stopped while it has it."""
        for attempt in range(NAMES_MAX):
            self.name = f"{name}.{attempt}" if attempt else name
            self._path = runtime_dir / LOCKS / self.name
            self._fd = open_shared(self._path)
            if self._is_ours():
                return
        words = f"{NAMES_MAX} new files were locked or removed by somebody else"
        raise OSError(errno.EAGAIN, words, str(self._path))

    def _is_ours(self) -> bool:
        held = False
        try:
            held = lock_now(self._fd) and self.in_place
        finally:
            if not held:
                os.close(self._fd)
        return held

    @property
    def in_place(self) -> bool:
        """Whether the server still finds it; no longer after the runtime dir was removed."""
        return is_file_at(self._path, os.fstat(self._fd))

    def close(self) -> None:
        """The file stays: the server, or the next one, finds that nobody holds it, and removes it."""
        os.close(self._fd)


def open_shared(path: Path) -> int:
    """For reading and writing.  A new file belongs to whom its directory belongs to, and is as open as that,
    whoever makes it and with whatever umask: root's, made by a tool, is for the server and its user too."""
    try:
        directory = os.open(path.parent, DIRECTORY)
        try:
            return _open_in(directory, path.name)
        finally:
            os.close(directory)
    except OSError as error:
        error.filename = str(path)
        raise


def _open_in(directory: int, name: str) -> int:
    """No link is followed: root would give its owner what it leads to."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = None
    while fd is None:
        try:
            fd = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # it was removed just now
                return os.open(name, flags, dir_fd=directory)
    whose = os.fstat(directory)
    with contextlib.suppress(OSError):  # not ours to give away; the server says so if it may not read it
        os.fchown(fd, whose.st_uid if os.geteuid() == 0 else -1, whose.st_gid)
    os.fchmod(fd, whose.st_mode & 0o660)
    return fd


def is_file_at(path: Path, file: os.stat_result) -> bool:
    try:
        return os.path.samestat(path.stat(), file)
    except OSError:
        return False


def lock_now(fd: int) -> bool:
    """Takes the lock if nobody holds it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
