"""The arena file: made, taken over, checked against the machine's memory, and populated."""

import contextlib
import errno
import hashlib
import logging
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cache_server.arena import Arena
from cache_server.beats import Part, Pulse
from cache_server.clock import monotonic_ms
from cache_server.faults import Faults
from cache_server.protocol.presence import is_file_at, lock_now
from cache_server.protocol.slots import (
    DATA_ALIGN,
    MAGIC,
    SLAB_RAW,
    FormatError,
    Geometry,
    clear_tables,
    read_header,
    read_slab,
    record_boot,
    write_header,
)

log = logging.getLogger(__name__)

MACHINE_BOOT = Path("/proc/sys/kernel/random/boot_id")
MACHINE_BOOT_BYTES = 8  # at an arena id's end
POPULATE_STEP_BYTES = 4 << 20
RETRY_S = 5.0
HEADER_BYTES = 4096
BLOCK_BYTES = 512  # the unit of st_blocks


class ArenaError(Exception):
    """The arena can't be had; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class ArenaFile:
    path: Path
    fd: int
    id: bytes
    geometry: Geometry
    map: mmap.mmap  # header and tables; the data is the clients' business
    table: memoryview  # the only view of it

    @property
    def in_place(self) -> bool:
        """Whether clients that open the path still get this file."""
        return is_file_at(self.path, os.fstat(self.fd))

    def arena(self, boot: int, wall_s: int) -> Arena:
        return Arena(self.table, self.geometry, record_boot(self.table, boot, wall_s))

    def close(self) -> None:
        """Lets go of the lock, and of the memory of a file that has no name any more."""
        if not os.fstat(self.fd).st_nlink:
            free_pages(self.fd)
        self.table.release()
        self.map.close()
        os.close(self.fd)


def open_arena(path: Path, capacity_bytes: int, mode: int) -> ArenaFile:
    """Takes over the file if it is an arena of this capacity, else makes a fresh one in its place."""
    geometry = Geometry.of(capacity_bytes)
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        _check_memory(path.parent, geometry.file_bytes)
        return _create(path, geometry, mode)
    except OSError as error:
        raise ArenaError(f"arena {path}: {error.strerror}: check the file's owner and permissions") from error
    with contextlib.ExitStack() as on_refusal:
        on_refusal.callback(os.close, fd)
        _lock(fd, path)
        if not is_arena(fd):
            raise ArenaError(
                f"arena {path}: the file is no arena and is kept: remove it, or choose another --arena"
            )
        try:
            file = _take_over(path, fd, geometry)
        except FormatError as error:
            _check_memory(path.parent, geometry.file_bytes - BLOCK_BYTES * os.fstat(fd).st_blocks)
            log.warning("arena: %s starts empty, the old file can't be taken over: %s", path, error)
            free_pages(fd)
            path.unlink()
            return _create(path, geometry, mode)
        on_refusal.pop_all()
        return file


def _take_over(path: Path, fd: int, geometry: Geometry) -> ArenaFile:
    arena_id = _check_same(fd, geometry)
    mapped = _map(fd, geometry)
    table = memoryview(mapped)
    raw = sum(read_slab(table, geometry, slab) == SLAB_RAW for slab in range(geometry.slabs))
    try:
        _check_memory(path.parent, raw * (geometry.slab_bytes + geometry.entries_bytes))
    except ArenaError:
        table.release()
        mapped.close()  # it holds the lock as the descriptor does
        raise
    return ArenaFile(path, fd, arena_id, geometry, mapped, table)


def is_arena(fd: int) -> bool:
    """Of whatever format and however damaged: of others' files none begins as ours do.  An empty one can be
    nobody's loss."""
    return os.pread(fd, len(MAGIC), 0) in (MAGIC, b"")


def free_pages(fd: int) -> None:
    """Of an arena that is given up for good; asked by who holds its lock, before its name is removed.

    Engines map a removed arena until a successor is served to them, and there may be no room for the
    successor before this memory is free: they would wait for each other.
    The tables go first, so that whoever reads freed bytes finds his slot's entry blank when he looks at it
    after his last byte.  They are cleared, but keep their memory, and the file its length: engines go on
    looking at entries, and a look at a page that can't be had kills them."""
    size = os.fstat(fd).st_size
    try:
        geometry, _ = read_header(os.pread(fd, HEADER_BYTES, 0), any_version=True)
        if size != geometry.file_bytes:
            return
        with mmap.mmap(fd, size) as mapped:
            with memoryview(mapped) as table:
                clear_tables(table, geometry)
            for slab in range(geometry.slabs):  # other threads have their turn in between
                mapped.madvise(mmap.MADV_REMOVE, geometry.slab_at(slab), geometry.slab_bytes)
    except FormatError:  # no engine maps it
        return
    except OSError as error:
        log.warning("arena: its memory is free when all engines have let go of it: %s", error)


def _lock(fd: int, path: Path) -> None:
    """Two servers on one arena, from two runtime dirs say, would hand out the same slots."""
    if not lock_now(fd):
        raise ArenaError(f"arena {path}: another server uses it: choose another --arena")


def _check_same(fd: int, geometry: Geometry) -> bytes:
    """-> the arena's id"""
    found, arena_id = read_header(os.pread(fd, HEADER_BYTES, 0))
    if found != geometry or os.fstat(fd).st_size != geometry.file_bytes:
        raise FormatError(f"it was made for {found.capacity_bytes} bytes, now {geometry.capacity_bytes}")
    if arena_id[-MACHINE_BOOT_BYTES:] != machine_boot():  # on a disk, where tables may be newer than the data
        raise FormatError("it is of another boot of this machine, which may have lost some of it")
    return arena_id


def machine_boot() -> bytes:
    """Another one after each boot; the same where nobody tells."""
    try:
        told = MACHINE_BOOT.read_bytes()
    except OSError:
        told = b""
    return hashlib.blake2b(told, digest_size=MACHINE_BOOT_BYTES).digest()


def _create(path: Path, geometry: Geometry, mode: int) -> ArenaFile:
    unfinished = path.with_name(path.name + ".new")
    arena_id = os.urandom(16 - MACHINE_BOOT_BYTES) + machine_boot()
    try:
        fd = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        _lock(fd, unfinished)
        os.ftruncate(fd, geometry.file_bytes)
        os.posix_fallocate(fd, 0, geometry.table_at)
        mapped = _map(fd, geometry)
    except OSError as error:
        raise ArenaError(
            f"arena {path}: can't make a file of {geometry.file_bytes} bytes: {error.strerror}"
        ) from error
    table = memoryview(mapped)
    write_header(table, geometry, arena_id)
    unfinished.rename(path)  # only a whole arena ever has the name
    return ArenaFile(path, fd, arena_id, geometry, mapped, table)


def _map(fd: int, geometry: Geometry) -> mmap.mmap:
    return mmap.mmap(fd, geometry.data_at)


def _check_memory(directory: Path, wanted_bytes: int) -> None:
    """Refuses to promise memory that is not there: the kernel would kill somebody for it later."""
    for what, free_bytes in _free_bytes(directory).items():
        if wanted_bytes > free_bytes:
            raise ArenaError(
                f"arena in {directory}: {wanted_bytes >> 20} MiB more are to be filled, but {what} "
                f"has {free_bytes >> 20} MiB free: lower --capacity or free memory"
            )


def _free_bytes(directory: Path) -> dict[str, int]:
    filesystem = os.statvfs(directory)
    if (
        filesystem.f_bsize >= DATA_ALIGN
    ):  # hugetlbfs: its pages are a pool of their own, which it does not tell
        pool = Path(f"/sys/kernel/mm/hugepages/hugepages-{filesystem.f_bsize >> 10}kB/free_hugepages")
        return {"the pool of huge pages": int(pool.read_text()) * filesystem.f_bsize}
    free = {"its file system": filesystem.f_bavail * filesystem.f_frsize}
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        free["the machine"] = int(line.split()[1]) << 10
    with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
        control_group = Path("/sys/fs/cgroup")
        limit = int((control_group / "memory.max").read_text())
        free["the control group"] = limit - int((control_group / "memory.current").read_text())
    return free


def _moved(pulse: Pulse, begun_ms: int) -> None:
    pulse.tick(monotonic_ms(), begun_ms)


class Populator:
    """Gives the arena's fresh memory to its slabs, and to their entries, in a thread of its own: no client
    ever waits for a first touch, and nobody, the server itself included, dies of one when there is no memory
    left.  It writes zeros into slabs that nobody has been given yet; whoever runs the arena takes the
    finished ones from `take_finished`."""

    def __init__(self, file: ArenaFile, slabs: list[int], part: Part, faults: Faults) -> None:
        self.failure = ""
        self._file = file
        self._waiting = deque(slabs)
        self._finished: deque[int] = deque()
        self._stop = threading.Event()
        self._part = part
        self._faults = faults
        self._thread = threading.Thread(target=self._run, name="populate", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def take_finished(self) -> list[int]:
        return [self._finished.popleft() for _ in range(len(self._finished))]

    def stop(self) -> None:
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)  # this thread's alone, on Linux
        zeros = bytes(POPULATE_STEP_BYTES)
        pulse = self._part.begin(monotonic_ms(), threading.current_thread().is_alive)
        begun_ms = monotonic_ms()
        while self._waiting and not self._stop.is_set():
            pulse.tick(monotonic_ms(), begun_ms)
            self._faults.at("populate")
            try:
                self._populate(self._waiting[0], zeros, partial(_moved, pulse, begun_ms))
            except OSError as error:
                if not self.failure:
                    log.error("arena: populating stopped: %s; going on with what there is", error)  # noqa: TRY400
                self.failure = str(error)
                self._stop.wait(RETRY_S)
                continue
            if not self._stop.is_set():
                if self.failure:
                    log.info("arena: populating goes on")
                self.failure = ""
                self._finished.append(self._waiting.popleft())
                begun_ms = monotonic_ms()
                pulse.tick(begun_ms, begun_ms, finished=1)
        pulse.end()

    def _populate(self, slab: int, zeros: bytes, moved: Callable[[], None]) -> None:
        geometry = self._file.geometry
        entries_at = geometry.entry_at(slab * geometry.entries_per_slab)
        os.posix_fallocate(self._file.fd, entries_at, geometry.entries_bytes)
        at = geometry.slab_at(slab)
        end = at + geometry.slab_bytes
        while at < end and not self._stop.is_set():
            moved()
            step = min(POPULATE_STEP_BYTES, end - at)
            try:
                at += os.pwrite(self._file.fd, zeros[:step] if step < len(zeros) else zeros, at)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                os.posix_fallocate(
                    self._file.fd, at, step
                )  # hugetlbfs knows no write, but clears what it gives
                at += step
