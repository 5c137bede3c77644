"""The runtime dir's file names, and the proof that a process lives.

Every engine process holds one file of its own under `locks/` locked (`flock`) for as long as it may touch the
arena.  The kernel lets go of the lock when the process is dead, however it died and in whichever container:
so a lock that can be taken proves that nobody writes any more, and silence proves nothing.
"""

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

from cache_server.protocol.keys import owner_of

SOCKET = "server.sock"
PID = "server.pid"
ARENA = "arena"
LOCKS = "locks"
TOKEN = "token"  # noqa: S105
LOG = "server.log"


def presence_name(engine: str) -> str:
    """Another one for every life, so that no process is taken for its predecessor."""
    return f"{owner_of(engine).hex()}.{os.getpid()}.{secrets.token_hex(4)}"


class Presence:
    """Held by the process itself, from before it registers until it has stopped touching the arena."""

    def __init__(self, runtime_dir: Path, name: str) -> None:
        self.name = name
        self._path = runtime_dir / LOCKS / name
        while True:
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            if self.in_place:
                return
            os.close(self._fd)  # the server took the empty file for a dead process's and removed it

    @property
    def in_place(self) -> bool:
        """Whether the server still finds it; no longer after the runtime dir was removed."""
        return is_file_at(self._path, os.fstat(self._fd))

    def close(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._fd)


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
