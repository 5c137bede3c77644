"""The worker's side: copies between this rank's KV cache and the arena, and says what became of each copy.

vLLM's worker thread calls all of it.  A load goes by the slot's entry, looked at before the first byte and
after the last: what was read in between is what the key names, or the load has failed.

A copy that has not begun at its deadline is called off, and has failed.  One that moves bytes is waited for,
however long it takes: its blocks are somebody else's as soon as it is told as ended.  It is a bounded number
of bytes from memory to memory; what holds it up for good has ended the engine's device, too.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lmconnector.arena import ArenaMap
from lmconnector.errors import StaleError
from lmconnector.metadata import Load, Outcome, Piece, Plan, Store
from lmconnector.transfer import Copy, Ticket, Transfer, new_transfer

log = logging.getLogger(f"vllm.{__name__}")

DEADLINE_MS = 2_000  # by default


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of each chunk."""

    number: int
    sizes: tuple[int, ...]  # bytes, per group
    block_bytes: int
    stores: bool  # of the ranks that hold the same, one stores it


@dataclass(slots=True)
class UnderWay:
    """A copy that was begun; the arena stays mapped until it has ended."""

    ticket: Ticket | None  # None: it could not be begun, or was called off
    arena: ArenaMap | None
    began_ns: int
    copied_bytes: int
    is_overdue: bool = False


class WorkerSide:
    def __init__(
        self,
        transfer: Transfer,
        part: Part,
        arena: Callable[[], ArenaMap | None],
        clock_ns: Callable[[], int] = time.perf_counter_ns,
        deadline_ms: int = DEADLINE_MS,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._transfer = transfer
        self._part = part
        self._arena = arena
        self._clock_ns = clock_ns
        self._deadline_ms = deadline_ms
        self._outcome = Outcome()
        self._bad_blocks: set[int] = set()
        self._loads_at_once: dict[int, tuple[Load, UnderWay]] = {}
        self._loads_beside: dict[int, tuple[Load, UnderWay]] = {}
        self._stores: dict[int, UnderWay] = {}
        self._spoiled = False  # this step may have computed from what was not there

    def load(self, plan: Plan) -> None:
        """Those needed by this step are done before anything that the engine computes in it."""
        for load in plan.loads:
            under_way = self._begin_load(plan, load)
            (self._loads_at_once if load.at_once else self._loads_beside)[load.number] = (load, under_way)
        ready = [number for number, (_, copy) in self._loads_at_once.items() if self._is_over(copy, "load")]
        for number in ready:
            self._end_load_at_once(number)

    def store(self, plan: Plan) -> None:
        """The source blocks are held until the store is told as ended."""
        self._end_loads_at_once()
        for store in plan.stores:
            if not self._part.stores:
                self._outcome.ended[store.number] = 1
            elif self._spoiled:
                self._end(store.number, ok=False)
            else:
                self._stores[store.number] = self._begin_store(plan, store)

    def take_finished_loads(self) -> tuple[set[str], set[str]]:
        """Of those beside the steps: the ended ones, and which of them failed.  Each is told once.

        With a draft model vLLM asks before it has the step stored: the bad blocks of loads at once, for which
        it asks next, have to be known now."""
        self._end_loads_at_once()
        ended, failed = set(), set()
        over = [number for number, (_, copy) in self._loads_beside.items() if self._is_over(copy, "load")]
        for number in over:
            load, under_way = self._loads_beside.pop(number)
            ended.add(load.request)
            if not self._end_load(load, under_way):
                failed.add(load.request)
        return ended, failed

    def take_bad_blocks(self) -> set[int]:
        blocks, self._bad_blocks = self._bad_blocks, set()
        return blocks

    def take_outcome(self) -> Outcome:
        """What has ended since the last time; the step is over."""
        over = [number for number, copy in self._stores.items() if self._is_over(copy, "store")]
        for number in over:
            under_way = self._stores.pop(number)
            moved_us = self._moved_us(under_way, "store")
            self._end(number, ok=moved_us is not None)
            if moved_us is not None:
                self.counts["store_bytes"] += under_way.copied_bytes
                self.counts["store_us"] += moved_us
        outcome, self._outcome, self._spoiled = self._outcome, Outcome(), False
        return outcome

    def close(self) -> bool:
        """-> whether no byte moves any more"""
        return self._transfer.close()

    def _end(self, number: int, *, ok: bool) -> None:
        self._outcome.ended[number] = 1
        if not ok:
            self._outcome.failed.add(number)

    def _end_loads_at_once(self) -> None:
        for number in list(self._loads_at_once):
            self._end_load_at_once(number)

    def _end_load_at_once(self, number: int) -> None:
        load, under_way = self._loads_at_once.pop(number)
        if not self._end_load(load, under_way):
            self._bad_blocks.update(load.blocks)
            self._spoiled = True

    def _end_load(self, load: Load, under_way: UnderWay) -> bool:
        moved_us = self._moved_us(under_way, "load")
        ok = False
        if moved_us is not None and self._is_fresh(load, under_way.arena):
            ok = True
            self.counts["load_bytes"] += under_way.copied_bytes
            self.counts["load_us"] += moved_us
            self._outcome.loaded_blocks += sum(len(piece.blocks) for piece in load.pieces)
            self._outcome.load_us += moved_us
        elif under_way.ticket is not None:
            self._clear(load)
        self._end(load.number, ok=ok)
        return ok

    def _begin_load(self, plan: Plan, load: Load) -> UnderWay:
        if load.lost:
            return _not_begun()
        try:
            arena = self._arena_of(plan)
            self._check(arena, load)
            copies = [self._copy(arena, plan, piece) for piece in load.pieces]
            began_ns = self._clock_ns()
            begin = self._transfer.load if load.at_once else self._transfer.load_beside
            return UnderWay(begin(copies), arena, began_ns, self._bytes(copies))
        except StaleError:
            self.counts["drops/load_stale"] += 1
        except Exception:  # whatever it is, the blocks are not what vLLM takes them for
            log.exception("load: failed, its blocks will be recomputed")
        return _not_begun()

    def _begin_store(self, plan: Plan, store: Store) -> UnderWay:
        try:
            arena = self._arena_of(plan)
            self._check_reserved(arena, store)
            copies = [self._copy(arena, plan, piece) for piece in store.pieces]
            began_ns = self._clock_ns()
            return UnderWay(self._transfer.store(copies), arena, began_ns, self._bytes(copies))
        except StaleError:
            self.counts["drops/store_stale"] += 1
        except Exception:  # a store that fails is a later miss
            log.exception("store: failed")
        return _not_begun()

    def _is_over(self, under_way: UnderWay, what: str) -> bool:
        ticket = under_way.ticket
        try:
            if ticket is None or ticket.done():
                return True
            late = self._clock_ns() - under_way.began_ns >= self._deadline_ms * 1_000_000
            if not late or under_way.is_overdue:
                return False
            if ticket.cancel():
                under_way.ticket = None  # not a byte has moved
                self.counts[f"drops/{what}_late"] += 1
                return True
        except Exception:  # its result tells
            log.exception("%s: can't be asked whether it is over", what)
            return True
        under_way.is_overdue = True
        self.counts["copies_overdue"] += 1
        log.warning("%s: still under way after %d ms, is waited for", what, self._deadline_ms)
        return False

    def _moved_us(self, under_way: UnderWay, what: str) -> int | None:
        """None: it has failed, which is a miss."""
        if under_way.ticket is None:
            return None
        try:
            return under_way.ticket.result()
        except Exception:  # a copy that fails is a miss
            log.exception("%s: failed", what)
            return None

    def _is_fresh(self, load: Load, arena: ArenaMap | None) -> bool:
        try:
            assert arena is not None, "the load was begun"
            self._check(arena, load)
        except StaleError:
            self.counts["drops/load_stale"] += 1
            return False
        except Exception:  # nobody knows what was read
            log.exception("load: its slots can't be looked at again")
            return False
        return True

    def _clear(self, load: Load) -> None:
        """Half of somebody else's bytes may be numbers that are none, and those spread."""
        try:
            self._transfer.clear(load.blocks)
        except Exception:  # they are going to be recomputed
            log.exception("load: its blocks could not be cleared")

    def _arena_of(self, plan: Plan) -> ArenaMap:
        arena = self._arena()
        if arena is None or arena.id != plan.arena:
            raise StaleError("the plan is for another arena than the one mapped here")
        return arena

    def _copy(self, arena: ArenaMap, plan: Plan, piece: Piece) -> Copy:
        begin = piece.slot.offset + plan.part_offsets[piece.group][self._part.number]
        part = arena.bytes[begin : begin + self._part.sizes[piece.group]]
        if part.numel() != self._part.sizes[piece.group]:
            raise StaleError(f"slot {piece.slot.number} does not lie within the arena")
        return Copy(part, piece.group, piece.first, piece.blocks)

    def _check(self, arena: ArenaMap, load: Load) -> None:
        for piece in load.pieces:
            if not arena.holds(piece.slot, piece.hash):
                raise StaleError(f"slot {piece.slot.number} holds something else now")

    def _check_reserved(self, arena: ArenaMap, store: Store) -> None:
        for piece in store.pieces:
            if not arena.is_reserved(piece.slot):
                raise StaleError(f"slot {piece.slot.number} is not reserved any more")

    def _bytes(self, copies: list[Copy]) -> int:
        return self._part.block_bytes * sum(len(copy.blocks) for copy in copies)


def _not_begun() -> UnderWay:
    return UnderWay(None, None, 0, 0)


def without_an_arena() -> WorkerSide:
    """Tells every load and store as failed, whatever a server may promise."""
    nothing = torch.zeros(1, 1, dtype=torch.uint8)
    return WorkerSide(new_transfer([nothing], ()), Part(0, (), 0, stores=True), lambda: None)
