"""The copy engine for a KV cache in a CUDA device's memory.

**Not run on a GPU so far, and no figure of it is measured**: the order of its streams is tested with
simulated ones, its addresses on the host, and tests/cuda waits for a device.

Three streams, so that a load which a step waits for queues behind nothing else: loads before a step, loads
beside the steps, stores.  Each job first waits for what the engine has enqueued so far: kernels in flight may
still read the blocks that a load will overwrite, for the request which owned them before, and write those
that a store reads.

Stores and loads beside the steps are enqueued by a thread for each: thousands of descriptors take their time,
and a copy to memory that is not pinned holds up the thread that asks for it until it is over.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from threading import Lock, Thread
from types import ModuleType

import numpy as np
import torch

from lmconnector import cores
from lmconnector.arena import ArenaMap
from lmconnector.geometry import GroupLayout
from lmconnector.transfer.attaching import PIECE_BYTES, Attachments, HostMemory
from lmconnector.transfer.base import CLOSE_S, Copy, Ticket
from lmconnector.transfer.runs import Longs, Pages, Spans, cut

log = logging.getLogger(f"vllm.{__name__}")

Enqueue = Callable[[Spans, Sequence[Copy], bool], None]  # on the current stream; True: into the KV cache


class Lane:
    """A stream, and the lock of whoever enqueues on it."""

    def __init__(self, cuda: ModuleType, device: torch.device) -> None:
        self.stream = cuda.Stream(device)
        self.lock = Lock()


class Enqueued:
    """The ticket of copies that no thread waits for; holds on to the memory that they read."""

    def __init__(self, begins: torch.cuda.Event, event: torch.cuda.Event, copies: Sequence[Copy]) -> None:
        self.begins = begins
        self.event = event
        self.copies = copies

    def done(self) -> bool:
        return bool(self.event.query())

    def cancel(self) -> bool:
        return False  # the device has it

    def result(self) -> int:
        self.event.synchronize()
        return _us(self.begins, self.event)


class CudaTransfer:
    """`cuda`, `enqueue` and `memory` are there for tests, which bring simulated ones."""

    def __init__(
        self,
        regions: Sequence[torch.Tensor],
        groups: Sequence[GroupLayout],
        cuda: ModuleType = torch.cuda,
        enqueue: Enqueue | None = None,
        memory: HostMemory | None = None,
    ) -> None:
        self._pages = Pages(regions[0].shape[0], [region.shape[1] for region in regions], groups)
        self._regions = regions
        self._cuda = cuda
        self._device = regions[0].device
        self._enqueue = enqueue or best_enqueue(regions)
        self._attachments = Attachments(memory or PinnedMemory())
        self._loads, self._beside, self._stores = (Lane(cuda, self._device) for _ in range(3))
        self._under_way: deque[Enqueued] = deque()
        self._beside_thread = ThreadPoolExecutor(1, "lmconnector-load", initializer=cores.spread)
        self._store_thread = ThreadPoolExecutor(1, "lmconnector-store", initializer=cores.spread)

    def attach(self, arena: ArenaMap) -> None:
        """An error of the driver stays pending on the calling thread, where CUDA's next check would find it:
        that thread launches no kernels."""
        try:
            with self._cuda.device(self._device):
                self._attachments.attach(arena)
        except Exception:  # pinned or not, the copies are right
            log.exception("arena: not pinned, copies are slower")

    def detach(self, arena: ArenaMap) -> None:
        with self._cuda.device(self._device):
            self._attachments.detach(arena, self._quiet)

    def load(self, copies: Sequence[Copy]) -> Ticket:
        self._pages.check(copies)
        compute = self._cuda.current_stream(self._device)
        begins, ends = (self._cuda.Event(enable_timing=True) for _ in range(2))
        ticket = Enqueued(begins, ends, tuple(copies))
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft()
        with self._loads.lock:
            self._loads.stream.wait_stream(compute)
            begins.record(self._loads.stream)
            try:
                self._copy(self._loads, ticket.copies, to_kv=True)
            finally:  # also when some of them were enqueued and others failed
                ticket.event.record(self._loads.stream)
                compute.wait_event(ticket.event)
                self._under_way.append(ticket)
        return ticket

    def load_beside(self, copies: Sequence[Copy]) -> Ticket:
        self._pages.check(copies)
        return self._beside_thread.submit(self._run, self._beside, tuple(copies), self._so_far(), to_kv=True)

    def store(self, copies: Sequence[Copy]) -> Ticket:
        self._pages.check(copies)
        return self._store_thread.submit(self._run, self._stores, tuple(copies), self._so_far(), to_kv=False)

    def clear(self, blocks: Sequence[int]) -> None:
        self._pages.check_blocks(blocks)
        rows = torch.tensor(blocks, dtype=torch.int64).to(self._device, non_blocking=True)
        for region in self._regions:
            region.index_fill_(0, rows, 0)

    def close(self) -> bool:
        until_s = time.monotonic() + CLOSE_S
        waiting = Thread(target=self._end_copies, name="lmconnector-close", daemon=True)  # maybe for ever
        waiting.start()
        waiting.join(CLOSE_S)
        over = not waiting.is_alive()
        with self._cuda.device(self._device):
            self._attachments.close(self._quiet, until_s if over else 0.0)
        return over

    def _end_copies(self) -> None:
        for thread in (self._beside_thread, self._store_thread):
            thread.shutdown(wait=False, cancel_futures=True)
        for thread in (self._beside_thread, self._store_thread):
            thread.shutdown(wait=True)
        self._loads.stream.synchronize()

    def _so_far(self) -> torch.cuda.Event:
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self._device))
        return event

    def _run(self, lane: Lane, copies: Sequence[Copy], after: torch.cuda.Event, *, to_kv: bool) -> int:
        """All of a job of a lane's thread: when it returns no byte moves any more.  -> us"""
        begins = self._cuda.Event(enable_timing=True)
        over = self._cuda.Event(enable_timing=True, blocking=True)  # sleeps, where others spin
        try:
            with lane.lock:
                lane.stream.wait_event(after)
                begins.record(lane.stream)
                self._copy(lane, copies, to_kv=to_kv)
        finally:
            over.record(lane.stream)
            over.synchronize()
        return _us(begins, over)

    def _copy(self, lane: Lane, copies: Sequence[Copy], *, to_kv: bool) -> None:
        spans = self._pages.spans(copies)
        if len(spans.size):
            spans = cut(spans, _parts(copies)[spans.copy] + spans.in_part, PIECE_BYTES)
            with self._cuda.stream(lane.stream):  # of the regions' device, which becomes the current one
                self._enqueue(spans, copies, to_kv)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """No copy is under way.  The lane of the engine's own thread comes last: it is held up the least."""
        with ExitStack() as stack:
            for lane in (self._stores, self._beside, self._loads):
                stack.enter_context(lane.lock)
                lane.stream.synchronize()
            yield


def _us(begins: torch.cuda.Event, ends: torch.cuda.Event) -> int:
    return int(1_000 * begins.elapsed_time(ends))


def _parts(copies: Sequence[Copy]) -> Longs:
    return np.array([copy.part.data_ptr() for copy in copies], np.int64)


def best_enqueue(regions: Sequence[torch.Tensor]) -> Enqueue:
    """vLLM's operator is one call of the driver for all spans (CUDA 12.8 or newer, else its own loop)."""
    try:
        from vllm import _custom_ops  # noqa: PLC0415  tests and tools run without vLLM
    except ImportError:
        return one_by_one(regions)
    if not hasattr(torch.ops._C_cache_ops, "swap_blocks_batch"):  # noqa: SLF001
        return one_by_one(regions)
    return batched(regions, _custom_ops.swap_blocks_batch)


def batched(
    regions: Sequence[torch.Tensor],
    copy_batch: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], None],
) -> Enqueue:
    bases = np.array([region.data_ptr() for region in regions], np.int64)

    def enqueue(spans: Spans, copies: Sequence[Copy], to_kv: bool) -> None:
        in_kv = torch.from_numpy(bases[spans.region] + spans.in_region)
        in_arena = torch.from_numpy(_parts(copies)[spans.copy] + spans.in_part)
        source, target = (in_arena, in_kv) if to_kv else (in_kv, in_arena)
        # A source in the arena may be read out of the stream's order: no kernel writes it.
        copy_batch(source, target, torch.from_numpy(spans.size), to_kv)

    return enqueue


def one_by_one(regions: Sequence[torch.Tensor]) -> Enqueue:
    flat = [region.view(-1) for region in regions]

    def enqueue(spans: Spans, copies: Sequence[Copy], to_kv: bool) -> None:
        rows = zip(*(column.tolist() for column in spans), strict=True)
        for region, in_region, copy, in_part, size in rows:
            in_kv = flat[region][in_region : in_region + size]
            in_arena = copies[copy].part[in_part : in_part + size]
            source, target = (in_arena, in_kv) if to_kv else (in_kv, in_arena)
            target.copy_(source, non_blocking=True)

    return enqueue


class PinnedMemory:
    done = "pinned"
    advice = "check `ulimit -l` and how much memory the container may use"

    def prepare(self, address: int, size_bytes: int) -> int:
        return int(torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0))

    def forget(self, address: int) -> int:
        return int(torch.cuda.cudart().cudaHostUnregister(address))

    def explain(self, code: int) -> str:
        cudart = torch.cuda.cudart()
        return str(cudart.cudaGetErrorString(cudart.cudaError(code)))
