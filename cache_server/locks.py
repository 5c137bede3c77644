"""The server's look at the presence files: which engine processes live, and which are proven to be dead.

Once seen held, a file is kept open, and asked itself whether somebody still holds it: its name may be removed
or its directory moved away while its process lives.  A name that is not there proves nothing.
"""

import contextlib
import errno
import os
from pathlib import Path

from cache_server.limits import RefusedError
from cache_server.protocol.messages import Code
from cache_server.protocol.presence import LOCKS, is_file_at, lock_now
from cache_server.workers import Seen

KEPT_MAX = 8_192  # twice the processes that may register; further ones are looked at by their names
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG)


class LockDir:
    def __init__(self, runtime_dir: Path) -> None:
        self._path = runtime_dir / LOCKS
        self._kept: dict[str, int] = {}  # descriptors of files that were held at the last look
        self._free: set[str] = set()  # the names of those that were not

    def look(self) -> Seen:
        living: set[str] = set()
        for name in dict.fromkeys((*self._kept, *self._names())):
            try:
                lives = self._is_held(name)
            except OSError:  # somebody else's file, or no descriptor is left for it
                lives = True
            if lives:
                living.add(name)
        return Seen(frozenset(living), frozenset(living | self._free))

    def is_locked(self, name: str) -> bool:
        try:
            return self._is_held(name)
        except OSError as error:
            raise RefusedError(Code.NO_PROOF, self._why_unreadable(name, error)) from error

    def remove(self, names: list[str]) -> None:
        """What the dead have left behind, and nobody needs as a proof any more."""
        for name in names:
            self._free.discard(name)
            with contextlib.suppress(OSError):
                self._remove(name)

    def close(self) -> None:
        for fd in self._kept.values():
            os.close(fd)
        self._kept.clear()

    def _names(self) -> list[str]:
        try:
            return os.listdir(self._path)
        except OSError:
            return []

    def _is_held(self, name: str) -> bool:
        """Raises `OSError` where that can't be told."""
        fd = self._kept.pop(name, None)
        while True:
            fd = self._open(name) if fd is None else fd
            if fd is None:
                return False
            if not lock_now(fd):
                self._free.discard(name)
                self._keep(name, fd)
                return True
            self._free.add(name)
            replaced = not is_file_at(self._path / name, os.fstat(fd))
            os.close(fd)
            if not replaced:
                return False
            fd = None

    def _keep(self, name: str, fd: int) -> None:
        if len(self._kept) < KEPT_MAX:
            self._kept[name] = fd
        else:
            os.close(fd)

    def _open(self, name: str) -> int | None:
        """None: there is no such presence file."""
        if name in (".", "..") or os.sep in name or "\0" in name:
            return None
        try:
            return os.open(self._path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in NO_FILE:
                return None
            raise

    def _remove(self, name: str) -> None:
        fd = self._open(name)
        if fd is None:
            return
        try:
            # Nobody holds this file, so only we remove it, and until then no other takes its name.
            if lock_now(fd) and is_file_at(self._path / name, os.fstat(fd)):
                (self._path / name).unlink()
        finally:
            os.close(fd)

    def _why_unreadable(self, name: str, error: OSError) -> str:
        whose = ""
        with contextlib.suppress(OSError):
            stat = (self._path / name).stat(follow_symlinks=False)
            whose = f" (of user {stat.st_uid}, group {stat.st_gid}, mode {stat.st_mode & 0o777:o})"
        return (
            f"locks/{name}{whose} can't be read by the server, user {os.geteuid()}: {error.strerror}: "
            "give it the directory's owner and group, and the group the right to read it"
        )
