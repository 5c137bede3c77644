"""Mapped memory made fast to copy, piece by piece: pinned for a GPU, in the page tables for the CPU.

A driver pins about 10 GB/s, under a lock that all CUDA processes of the machine share, and refuses 512 GiB at
once: so pieces are small, and there are rests between them.  Only what the server has populated is touched:
the control group of whoever touches memory first is charged for it.

A GPU's copy must be of memory that is pinned as a whole or not at all: `runs.cut` cuts them at the borders of
pieces, and so they are right at any moment, whatever is pinned by then.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Protocol

from lmconnector.arena import ArenaMap

log = logging.getLogger(f"vllm.{__name__}")

PIECE_BYTES = 64 << 20  # a multiple of every page size; some 7 ms of the driver's lock
REST = 3.0  # times as long as the piece took
POLL_S = 0.5
PATIENCE_S = 60.0  # with a server that populates nothing more


class HostMemory(Protocol):
    """Calls of a driver or of the kernel: 0 is success."""

    done: str  # what memory is afterwards
    advice: str  # when it fails

    def prepare(self, address: int, size_bytes: int) -> int: ...
    def forget(self, address: int) -> int: ...
    def explain(self, code: int) -> str: ...


Quiet = Callable[[], AbstractContextManager[None]]


@dataclass
class Mapping:
    prepared: list[int] = field(default_factory=list)  # addresses of pieces
    dropped: Event = field(default_factory=Event)


class Attachments:
    """Any thread may detach or close while another one attaches."""

    def __init__(self, memory: HostMemory) -> None:
        self._memory = memory
        self._mappings: dict[int, Mapping] = {}  # by their addresses
        self._lock = Lock()
        self._closed = Event()

    def attach(self, arena: ArenaMap) -> None:
        address, size = arena.data.data_ptr(), arena.data.numel()
        mapping = Mapping()
        with self._lock:
            if self._closed.is_set():
                return
            self._mappings[address] = mapping
        began = time.monotonic()
        for at, end in _pieces(address, address + size):
            if not self._await_populated(arena, at - address, end - address, mapping.dropped):
                break
            with _rest_after(mapping.dropped), self._lock:
                if mapping.dropped.is_set():
                    return
                code = self._memory.prepare(at, end - at)
                if code == 0:
                    mapping.prepared.append(at)
            if code:
                log.warning(
                    "arena: %d of %d MiB %s, then error %d (%s): copies of the rest are slower; %s",
                    (at - address) >> 20, size >> 20, self._memory.done, code, self._memory.explain(code),
                    self._memory.advice,
                )  # fmt: skip
                return
        else:
            log.info("arena: %d MiB %s in %.1f s", size >> 20, self._memory.done, time.monotonic() - began)

    def detach(self, arena: ArenaMap, quiet: Quiet) -> None:
        """`quiet`: while it is held no copy is under way."""
        self._drop(arena.data.data_ptr(), quiet)

    def close(self, quiet: Quiet, until_s: float) -> None:
        """`until_s`: of `time.monotonic`.  What is left by then, the kernel lets go when the process ends."""
        with self._lock:
            self._closed.set()
            addresses = list(self._mappings)
        for address in addresses:
            self._drop(address, quiet, until_s)

    def _drop(self, address: int, quiet: Quiet, until_s: float = math.inf) -> None:
        with self._lock:
            mapping = self._mappings.pop(address, Mapping())
            mapping.dropped.set()
        for let_go, at in enumerate(mapping.prepared):
            if time.monotonic() >= until_s:
                left = len(mapping.prepared) - let_go
                log.info("arena: %d pieces stay %s until this process ends", left, self._memory.done)
                return
            with _rest_after(self._closed), quiet():
                code = self._memory.forget(at)
            if code:
                log.warning("arena: can't be let go: error %d (%s)", code, self._memory.explain(code))

    def _await_populated(self, arena: ArenaMap, begin: int, end: int, dropped: Event) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        while not arena.populated(begin, end):
            if dropped.wait(POLL_S):
                return False
            if time.monotonic() > deadline:
                log.info(
                    "arena: %d MiB %s; the server has not populated the rest, copies of it are slower",
                    begin >> 20, self._memory.done,
                )  # fmt: skip
                return False
        return True


def _pieces(address: int, end: int) -> Iterator[tuple[int, int]]:
    """Their borders are multiples of PIECE_BYTES."""
    while address < end:
        border = min(end, (address // PIECE_BYTES + 1) * PIECE_BYTES)
        yield address, border
        address = border


@contextmanager
def _rest_after(unless: Event) -> Iterator[None]:
    """Others have the locks for a while."""
    began = time.monotonic()
    yield
    unless.wait(REST * (time.monotonic() - began))
