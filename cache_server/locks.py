"""The server's look at the presence files: which engine processes live."""

import contextlib
import os
from pathlib import Path

from cache_server.protocol.presence import LOCKS, is_file_at, lock_now


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
        while True:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                return False
            try:
                if not lock_now(fd):
                    return True
                # Nobody holds this file, so only we remove it, and until then no other takes its name.
                if is_file_at(path, os.fstat(fd)):
                    with contextlib.suppress(OSError):
                        path.unlink()
                    return False
            finally:
                os.close(fd)  # it had been replaced since we opened it: look at the new one
