"""The server's look at the presence files: which engine processes live."""

import contextlib
import os
from pathlib import Path

from cache_server.protocol.presence import LOCKS, lock_now


class LockDir:
    def __init__(self, runtime_dir: Path) -> None:
        self._path = runtime_dir / LOCKS

    def scan(self) -> frozenset[str]:
        """The names that are held; files whose holder is dead are removed."""
        try:
            names = os.listdir(self._path)
        except FileNotFoundError:
            return frozenset()
        return frozenset(name for name in names if self.is_locked(name))

    def is_locked(self, name: str) -> bool:
        if os.sep in name or name in (".", ".."):
            return False
        path = self._path / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return False
        try:
            if not lock_now(fd):
                return True
            with contextlib.suppress(OSError):
                path.unlink()  # while we hold its lock: `Presence` sees it and makes a new file
            return False
        finally:
            os.close(fd)
