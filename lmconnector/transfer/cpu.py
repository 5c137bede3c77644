"""The copy engine for a KV cache in the host's memory: numpy copies whole pages by their block ids.

Chosen by measurement (docs/performance-transfer.md) over torch, whose indexed copies go element by element
and whose threads wait for each other on a busy machine, and over one memmove for each run of blocks.  numpy
lets go of the GIL while it copies.
"""

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray

from lmconnector import cores
from lmconnector.arena import ArenaMap
from lmconnector.geometry import GroupLayout
from lmconnector.transfer.attaching import Attachments
from lmconnector.transfer.base import CLOSE_S, Copy, Ticket
from lmconnector.transfer.runs import Pages

PageArray = NDArray[np.void]  # a page is an item, which numpy moves by one memcpy
Blocks = NDArray[np.intp]

MADV_POPULATE_READ = 22  # writable as well: the mapping is shared


class CpuTransfer:
    """`load` and `store` are over when they return; `load_beside` has a thread of its own."""

    def __init__(self, regions: Sequence[torch.Tensor], groups: Sequence[GroupLayout]) -> None:
        self._pages = Pages(regions[0].shape[0], [region.shape[1] for region in regions], groups)
        self._regions = [region.numpy().view(f"V{region.shape[1]}")[:, 0] for region in regions]
        self._attachments = Attachments(MappedMemory())
        self._beside = ThreadPoolExecutor(1, "lmconnector-load", initializer=cores.spread)
        self._under_way: set[Future[int]] = set()

    def attach(self, arena: ArenaMap) -> None:
        self._attachments.attach(arena)

    def detach(self, arena: ArenaMap) -> None:
        self._attachments.detach(arena, nullcontext)

    def load(self, copies: Sequence[Copy]) -> Ticket:
        self._pages.check(copies)
        return _over(self._copy(copies, _scatter))

    def load_beside(self, copies: Sequence[Copy]) -> Ticket:
        self._pages.check(copies)
        ticket = self._beside.submit(self._copy, tuple(copies), _scatter)
        self._under_way.add(ticket)
        ticket.add_done_callback(self._under_way.discard)
        return ticket

    def store(self, copies: Sequence[Copy]) -> Ticket:
        self._pages.check(copies)
        return _over(self._copy(copies, _gather))

    def clear(self, blocks: Sequence[int]) -> None:
        self._pages.check_blocks(blocks)
        for region in self._regions:
            region[list(blocks)] = bytes(region.itemsize)

    def close(self) -> bool:
        until_s = time.monotonic() + CLOSE_S
        self._attachments.close(nullcontext, until_s)
        self._beside.shutdown(wait=False, cancel_futures=True)
        return not wait(self._under_way.copy(), until_s - time.monotonic()).not_done

    def _copy(self, copies: Sequence[Copy], move: Callable[[PageArray, Blocks, PageArray], None]) -> int:
        """-> us"""
        began_ns = time.perf_counter_ns()
        for copy in copies:
            part, blocks = copy.part.numpy(), np.array(copy.blocks, np.intp)
            for region, at in zip(self._regions, self._pages.in_part(copy), strict=True):
                move(region, blocks, part[at : at + len(blocks) * region.itemsize].view(region.dtype))
        return (time.perf_counter_ns() - began_ns) // 1_000


def _over(us: int) -> Ticket:
    ticket: Future[int] = Future()
    ticket.set_result(us)
    return ticket


def _scatter(region: PageArray, blocks: Blocks, rows: PageArray) -> None:
    region[blocks] = rows


def _gather(region: PageArray, blocks: Blocks, rows: PageArray) -> None:
    region.take(blocks, out=rows, mode="clip")  # checked already: "raise" would copy twice


class MappedMemory:
    """Page tables, filled before the first copy: it would be six times slower for all the page faults."""

    done = "mapped"
    advice = "Linux 5.14 or newer is needed"

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def prepare(self, address: int, size_bytes: int) -> int:
        memory, size = ctypes.c_void_p(address), ctypes.c_size_t(size_bytes)
        return ctypes.get_errno() if self._libc.madvise(memory, size, MADV_POPULATE_READ) else 0

    def forget(self, address: int) -> int:
        return 0

    def explain(self, code: int) -> str:
        return os.strerror(code)
