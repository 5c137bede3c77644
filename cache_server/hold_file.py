"""The file in the runtime dir that keeps the holds on readiness.

Commands write it, one at a time, and put it in place as a whole; the watch reads it at each of its turns, and
needs the main loop for nothing.  A server that starts anew finds it as it was: a hold ends by its time, or by
its owner.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cache_server.holds import HOLDS_MAX, Hold, running, with_hold, without_owner
from cache_server.json_text import decoded
from cache_server.protocol.presence import HOLDS, HOLDS_LOCK, open_shared

FILE_BYTES_MAX = 1 << 20


class HoldError(Exception):
    """The message says what is in the way."""


def read_holds(runtime_dir: Path, now_ms: int) -> tuple[Hold, ...]:
    """What is no list of holds holds nothing."""
    with contextlib.suppress(OSError), (runtime_dir / HOLDS).open("rb") as file:
        return running(decoded(file.read(FILE_BYTES_MAX), tuple[Hold, ...]) or (), now_ms)
    return ()


def hold(runtime_dir: Path, new: Hold, now_ms: int) -> None:
    with _alone(runtime_dir):
        holds = with_hold(read_holds(runtime_dir, now_ms), new)
        if len(holds) > HOLDS_MAX:
            raise HoldError(f"{HOLDS_MAX} owners hold it already, the most there can be")
        _write(runtime_dir, holds)


def unhold(runtime_dir: Path, owner: str, now_ms: int) -> bool:
    """-> whether that owner had a hold"""
    with _alone(runtime_dir):
        before = read_holds(runtime_dir, now_ms)
        after = without_owner(before, owner)
        _write(runtime_dir, after)
        return after != before


def _write(runtime_dir: Path, holds: tuple[Hold, ...]) -> None:
    unfinished = runtime_dir / f"{HOLDS}.new"
    unfinished.unlink(missing_ok=True)
    with os.fdopen(open_shared(unfinished), "wb") as file:
        file.write(msgspec.json.encode(holds))
    unfinished.rename(runtime_dir / HOLDS)


@contextlib.contextmanager
def _alone(runtime_dir: Path) -> Iterator[None]:
    fd = open_shared(runtime_dir / HOLDS_LOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
