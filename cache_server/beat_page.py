"""One page of shared memory that says how the server is, for whoever can't or won't ask over HTTP.

The main loop and the watch each write words of their own; a word is stored and loaded as one.
The watch's verdict is text as well, so it lies between two counts that differ while it is written.
A reader needs nobody's help: it finds a stopped process by the age of the words.
"""

import contextlib
import mmap
import os
from pathlib import Path

import msgspec

from cache_server.protocol.presence import BEAT, is_file_at

PAGE_BYTES = 4096
WORD_BYTES = 8
MAGIC = 0x0031_5441_4542_5343  # "CSBEAT1"
(
    AT_MAGIC, AT_PID, AT_BOOT, AT_LOOP_MS, AT_LOOP_TICKS, AT_LEASE_UNTIL_MS, AT_WATCH_MS,
    AT_LATE_MS, AT_STALL_MS, AT_LIVE, AT_READY, AT_OPENED, AT_CLOSED, AT_TEXT_BYTES,
) = range(14)  # fmt: skip
TEXT_AT = 16 * WORD_BYTES
TEXT_BYTES_MAX = PAGE_BYTES - TEXT_AT
READ_TRIES = 100


class BeatRead(msgspec.Struct, frozen=True):
    pid: int
    boot: int
    loop_ms: int
    loop_ticks: int
    lease_until_ms: int
    watch_ms: int
    late_ms: int
    stall_ms: int
    live: bool
    ready: bool
    text: str


class BeatPage:
    def __init__(self, runtime_dir: Path, late_ms: int, stall_ms: int) -> None:
        """The old page, if there is one, is another process's: a new file takes its place."""
        self.path = runtime_dir / BEAT
        unfinished = runtime_dir / f"{BEAT}.new"
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, PAGE_BYTES)  # else a full file system is met at the first write
            self._map = mmap.mmap(fd, PAGE_BYTES)
            self._file = os.fstat(fd)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("B").cast("Q")
        self._words[AT_PID] = os.getpid()
        self._words[AT_LATE_MS], self._words[AT_STALL_MS] = late_ms, stall_ms
        self._words[AT_MAGIC] = MAGIC
        unfinished.rename(self.path)

    def told_boot(self, boot: int) -> None:
        self._words[AT_BOOT] = boot

    def loop_turned(self, now_ms: int, ticks: int) -> None:
        self._words[AT_LOOP_TICKS] = ticks
        self._words[AT_LOOP_MS] = now_ms

    def leased(self, until_ms: int) -> None:
        self._words[AT_LEASE_UNTIL_MS] = until_ms

    def watch_turned(self, now_ms: int, *, live: bool, ready: bool, text: str) -> None:
        encoded = text.encode()[:TEXT_BYTES_MAX]
        words = self._words
        words[AT_OPENED] += 1
        self._map[TEXT_AT : TEXT_AT + len(encoded)] = encoded
        words[AT_TEXT_BYTES] = len(encoded)
        words[AT_LIVE], words[AT_READY] = live, ready
        words[AT_WATCH_MS] = now_ms
        words[AT_CLOSED] = words[AT_OPENED]

    def close(self) -> None:
        if is_file_at(self.path, self._file):  # else it may be the next server's
            self.path.unlink(missing_ok=True)
        self._words.release()
        with contextlib.suppress(BufferError):
            self._map.close()


def read_beat(runtime_dir: Path) -> BeatRead | None:
    """None where no server has left a page."""
    try:
        fd = os.open(runtime_dir / BEAT, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(fd, "rb") as file, mmap.mmap(file.fileno(), PAGE_BYTES, prot=mmap.PROT_READ) as page:
        words, text = _read_once(page)
        for _ in range(READ_TRIES):
            if words[AT_OPENED] == words[AT_CLOSED] == _read_once(page)[0][AT_OPENED]:
                break
            words, text = _read_once(page)
        if words[AT_MAGIC] != MAGIC:
            return None
        return BeatRead(
            pid=words[AT_PID],
            boot=words[AT_BOOT],
            loop_ms=words[AT_LOOP_MS],
            loop_ticks=words[AT_LOOP_TICKS],
            lease_until_ms=words[AT_LEASE_UNTIL_MS],
            watch_ms=words[AT_WATCH_MS],
            late_ms=words[AT_LATE_MS],
            stall_ms=words[AT_STALL_MS],
            live=bool(words[AT_LIVE]),
            ready=bool(words[AT_READY]),
            text=text.decode(errors="replace"),
        )


def _read_once(page: mmap.mmap) -> tuple[memoryview, bytes]:
    words = memoryview(page[:TEXT_AT]).cast("Q")
    return words, page[TEXT_AT : TEXT_AT + min(words[AT_TEXT_BYTES], TEXT_BYTES_MAX)]
