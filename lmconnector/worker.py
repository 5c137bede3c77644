"""The worker's side: copies between this rank's KV cache and the arena, and says what became of each copy.

vLLM's worker thread calls all of it; loads that run beside the steps are copied by one thread of its own.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from lmconnector.arena import ArenaMap
from lmconnector.errors import StaleError
from lmconnector.metadata import Load, Outcome, Piece, Plan
from lmconnector.transfer import CpuTransfer

log = logging.getLogger(f"vllm.{__name__}")


class WorkerSide:
    def __init__(
        self, transfer: CpuTransfer, part_bytes: list[int], part: int, arena: Callable[[], ArenaMap | None]
    ) -> None:
        """`part`: which one of a chunk this rank holds; `part_bytes` of it, per group."""
        self.counts: Counter[str] = Counter()
        self._transfer = transfer
        self._part_bytes = part_bytes
        self._part = part
        self._arena = arena
        self._outcome = Outcome()
        self._bad_blocks: set[int] = set()
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="lmconnector-load")
        self._under_way: dict[str, Future[bool]] = {}

    def load(self, plan: Plan) -> None:
        """Those needed by this step are done when this returns."""
        for load in plan.loads:
            if load.at_once:
                self._end_load(load.request, ok=self._load(plan, load))
                if load.request in self._outcome.not_loaded:
                    self._bad_blocks.update(load.lost, *(piece.blocks for piece in load.pieces))
            else:
                self._under_way[load.request] = self._copier.submit(self._load, plan, load)

    def store(self, plan: Plan) -> None:
        """The source blocks are free to change when this returns."""
        for store in plan.stores:
            began_ns = time.perf_counter_ns()
            # After a failed load this step may have computed from what is not there: nothing of it is kept.
            ok = not self._outcome.not_loaded and self._store(plan, store.pieces)
            self.counts["store_us"] += (time.perf_counter_ns() - began_ns) // 1_000
            self._outcome.stored[store.number] = 1
            if not ok:
                self._outcome.not_stored.add(store.number)

    def take_finished_loads(self) -> tuple[set[str], set[str]]:
        """Of those beside the steps: the ended ones, and which of them failed.  Each is told once."""
        ended = {name for name, future in self._under_way.items() if future.done()}
        failed = set()
        for name in ended:
            ok = self._under_way.pop(name).result()
            self._end_load(name, ok=ok)
            if not ok:
                failed.add(name)
        return ended, failed

    def take_bad_blocks(self) -> set[int]:
        blocks, self._bad_blocks = self._bad_blocks, set()
        return blocks

    def take_outcome(self) -> Outcome:
        outcome, self._outcome = self._outcome, Outcome()
        return outcome

    def close(self) -> None:
        self._copier.shutdown(wait=True, cancel_futures=True)

    def _end_load(self, request: str, *, ok: bool) -> None:
        self._outcome.loaded[request] = 1
        if not ok:
            self._outcome.not_loaded.add(request)

    def _load(self, plan: Plan, load: Load) -> bool:
        began_ns = time.perf_counter_ns()
        if load.lost:
            return False
        try:
            arena = self._arena_of(plan)
            for piece in load.pieces:
                self._check(arena, piece)
            for piece in load.pieces:
                self._transfer.load(self._part_of(arena, plan, piece), piece.group, piece.first, piece.blocks)
            for piece in load.pieces:
                self._check(arena, piece)
        except StaleError:
            self.counts["stale_loads"] += 1
            return False
        except Exception:  # whatever it is, the blocks are not what vLLM takes them for
            log.exception("load: failed, its blocks will be recomputed")
            return False
        self.counts["load_us"] += (time.perf_counter_ns() - began_ns) // 1_000
        return True

    def _store(self, plan: Plan, pieces: list[Piece]) -> bool:
        try:
            arena = self._arena_of(plan)
            for piece in pieces:
                self._transfer.store(
                    self._part_of(arena, plan, piece), piece.group, piece.first, piece.blocks
                )
        except StaleError:
            return False
        except Exception:  # a store that fails is a later miss
            log.exception("store: failed")
            return False
        return True

    def _arena_of(self, plan: Plan) -> ArenaMap:
        arena = self._arena()
        if arena is None or arena.id != plan.arena:
            raise StaleError("the plan is for another arena than the one mapped here")
        return arena

    def _part_of(self, arena: ArenaMap, plan: Plan, piece: Piece) -> torch.Tensor:
        begin = piece.slot.offset + plan.part_offsets[piece.group][self._part]
        size = self._part_bytes[piece.group]
        self.counts["copied_bytes"] += size
        return arena.bytes[begin : begin + size]

    def _check(self, arena: ArenaMap, piece: Piece) -> None:
        if not arena.holds(piece.slot, piece.hash):
            raise StaleError(f"slot {piece.slot.number} holds something else now")
