"""Planted bugs in the connector, for the whole system's simulation."""

import dataclasses
from collections.abc import Callable, Sequence

from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef
from cache_server.protocol.slots import read_entry
from lmconnector.arena import ArenaMap
from lmconnector.client import OnReply
from lmconnector.health import Health
from lmconnector.jobs import Jobs
from lmconnector.metadata import Load, Outcome, Piece, Plan, Store
from lmconnector.requests import Found, Phase, Record, Request
from lmconnector.scheduler import SchedulerSide
from lmconnector.stock import Stock
from lmconnector.stores import Batch, Stores
from lmconnector.worker import UnderWay, WorkerSide
from sim.whole.engine import WatchedClient

NEVER_MS = 10**12


# The scheduler's side


class OffersEverything(SchedulerSide):
    """Not even one token is left to compute."""

    def _offer(self, record: Record, found: Found, request: Request, local: int) -> tuple[int | None, bool]:
        tokens, beside = super()._offer(record, found, request, local)
        whole = found.chunks * self._layout.chunk_tokens
        return (
            (tokens + 1, beside)
            if tokens and not beside and whole >= request.num_tokens
            else (tokens, beside)
        )


class OffersAChunkMore(SchedulerSide):
    def _offer(self, record: Record, found: Found, request: Request, local: int) -> tuple[int | None, bool]:
        return super()._offer(record, dataclasses.replace(found, chunks=found.chunks + 1), request, local)


class LoadsBeforeTheStep(SchedulerSide):
    """Also where the next step does not wait for this one's outcome."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self._always_beside = self._hybrid


class LoadsHybridsBeforeTheStep(SchedulerSide):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self._always_beside = False


class LeavesHashesBehind(SchedulerSide):
    """Of blocks that were not loaded."""

    def _end_load(self, record: Record, lease: str, load: Load, table: Sequence[int], ok: bool) -> None:
        super()._end_load(record, lease, load, load.blocks[:1], ok)


class LeavesLaterHashesBehind(SchedulerSide):
    """Of blocks that were computed from those that were not loaded."""

    def _end_load(self, record: Record, lease: str, load: Load, table: Sequence[int], ok: bool) -> None:
        super()._end_load(record, lease, load, load.blocks, ok)


class LetsOthersJoinALoad(SchedulerSide):
    """Which may yet fail."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self._loading.is_shared = lambda request, local_tokens: False


class PairsWrongly(SchedulerSide):
    """Not a mutant itself."""

    def take_loads(self) -> Plan:
        plan = super().take_loads()
        for load in plan.loads:
            load.pieces = [self.mispair(piece) for piece in load.pieces]
        return plan

    def mispair(self, piece: Piece) -> Piece:
        raise NotImplementedError


class LoadsIntoTheWrongBlock(PairsWrongly):
    def mispair(self, piece: Piece) -> Piece:
        return piece._replace(blocks=piece.blocks[::-1])


class LoadsFromTheChunksBegin(PairsWrongly):
    """Wherever in the chunk the blocks are that it lacks."""

    def mispair(self, piece: Piece) -> Piece:
        return piece._replace(first=0)


class ForgetsTheLastBlock(PairsWrongly):
    def mispair(self, piece: Piece) -> Piece:
        return piece._replace(blocks=piece.blocks[: max(1, len(piece.blocks) - 1)])


class KeepsLeases(SchedulerSide):
    def _end_load(self, record: Record, lease: str, load: Load, table: Sequence[int], ok: bool) -> None:
        super()._end_load(record, lease, load, table, ok)
        self._releases.remove(lease)


class KeepsLeasesOfTheAborted(SchedulerSide):
    def on_finished(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self._records.pop(request_id, None)


class KeepsRecords(SchedulerSide):
    def on_finished(self, request_id: str) -> None:
        record = self._records[request_id]
        super().on_finished(request_id)
        if record.phase is Phase.LOADING:
            self._records[request_id] = record


class WaitsForEver(SchedulerSide):
    """For another request that loads the same."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self._loading.brought = lambda chunks: None


class WaitsForTheReply(SchedulerSide):
    """A step waits for a lookup for as long as that takes."""

    def _wait_for_lookup(self, record: Record) -> None:
        while record.phase is Phase.LOOKING and self._gate.usable:
            self._client.poll(1)
        super()._wait_for_lookup(record)


# Stores


class StoresTooMuch(Stores):
    """What the next step computes."""

    def plan(
        self, record: Record, block_hashes: list[bytes], tokens: int, tables: Callable[[], object]
    ) -> Store | None:
        return super().plan(record, block_hashes, tokens + self._layout.chunk_tokens // 2, tables)


class LetsGoTooEarly(Stores):
    def _end(self, batch: Batch, *, ok: bool) -> None:
        self._blocks.hold(batch.blocks)
        super()._end(batch, ok=ok)

    def plan(
        self, record: Record, block_hashes: list[bytes], tokens: int, tables: Callable[[], object]
    ) -> Store | None:
        store = super().plan(record, block_hashes, tokens, tables)
        if store is not None:
            self._blocks.let_go([block for piece in store.pieces for block in piece.blocks])
        return store


class NeverLetsGo(Stores):
    """Of the blocks of a store that failed."""

    def _end(self, batch: Batch, *, ok: bool) -> None:
        if not ok:
            self._blocks.hold(batch.blocks)
        super()._end(batch, ok=ok)


class LetsGoTwice(Stores):
    def _end(self, batch: Batch, *, ok: bool) -> None:
        super()._end(batch, ok=ok)
        if not ok:
            self._blocks.let_go(batch.blocks)


class CommitsWhatFailed(Stores):
    def _end(self, batch: Batch, *, ok: bool) -> None:
        super()._end(batch, ok=True)


class CommitsIntoTheNextArena(Stores):
    def _is_of_another_arena(self, batch: Batch) -> bool:
        return False


class NeverChangesItsEpoch(Stores):
    def begin_anew(self) -> bool:
        self._ours.clear()
        return True


class StoresWithoutAParent(Stores):
    def _commit(self, batch: Batch, session: int) -> None:
        super()._commit(dataclasses.replace(batch, parent=b""), session)


# The stock


class LosesSlots(Stock):
    """Nobody tells the server of them."""

    def lost(self, slots: list[SlotRef]) -> None:
        self.settled(slots)


class TakesAnyReplyForTheLatest(Stock):
    def _tell_what_we_hold(self, now_ms: int) -> None:
        super()._tell_what_we_hold(now_ms)
        self._unsure = True

    def refill(self, now_ms: int) -> None:
        super().refill(now_ms)
        if not self._client._pending:
            self._unsure = False


class ForgetsWhatIsOut(Stock):
    """And gives it back while workers write into it."""

    def take(self, group: int) -> SlotRef | None:
        slot = super().take(group)
        self._out.clear()
        return slot

    def put_back(self, group: int, slot: SlotRef) -> None:
        self._slots[group].append(slot)


class UsesSlotsTwice(Stock):
    def settled(self, slots: list[SlotRef]) -> None:
        super().settled(slots)
        self._slots[0] += slots


class KeepsTheOldArena(Stock):
    def _forget(self, arena: bytes) -> None:
        self.arena = arena


class HoardsSlots(Stock):
    def _trim(self) -> None:
        pass


class IgnoresStrays(Stock):
    """Slots of a request that arrived twice."""

    def _take_stray(self, reply: m.Reply) -> None:
        pass


class IgnoresLostReservations(Stock):
    def _ask(self, group: int, now_ms: int) -> None:
        unsure = self._unsure
        super()._ask(group, now_ms)
        pending = self._client._pending
        if pending:
            id_, (deadline_ms, on_reply) = list(pending.items())[-1]

            def take(reply: m.Reply | None) -> None:
                on_reply(reply)
                if reply is None:
                    self._unsure = unsure

            pending[id_] = (deadline_ms, take)


# Jobs, the client, the workers


class BelievesTheFirstRank(Jobs):
    def take(self, outcome: Outcome) -> None:
        for number in list(outcome.ended):
            if number in self._jobs:
                self._jobs[number].workers_left = outcome.ended[number]
            else:
                del outcome.ended[number]
        outcome.failed &= set(self._jobs)
        super().take(outcome)


class BelievesTheLastRank(Jobs):
    """Whether it has failed."""

    def take(self, outcome: Outcome) -> None:
        outcome.failed = {
            number for number in outcome.failed if self._jobs[number].workers_left == outcome.ended[number]
        }
        super().take(outcome)


class StoresWhatWasComputedFromNothing(Jobs):
    """Loads fail, and what was computed from them is stored."""

    def _fail(self, numbers: set[int]) -> None:
        for number in numbers:
            self._jobs[number].failed = True


class HasNoDeadlines(WatchedClient):
    def send(self, request: m.Request, deadline_ms: int, on_reply: OnReply) -> None:
        super().send(request, NEVER_MS, on_reply)


class AnswersTwice(WatchedClient):
    """A late reply is taken for one in time."""

    def send(self, request: m.Request, deadline_ms: int, on_reply: OnReply) -> None:
        super().send(request, deadline_ms, on_reply)
        if request.id in self._pending:
            self._late = {**getattr(self, "_late", {}), request.id: on_reply}

    def poll(self, timeout_ms: int) -> None:
        late = getattr(self, "_late", {})
        for event in self._link._events:
            if isinstance(event, m.Reply) and event.id in late and event.id not in self._pending:
                late.pop(event.id)(event)
        super().poll(timeout_ms)


class NeverLooksAgain(WorkerSide):
    """At the slot, after the last byte."""

    def _is_fresh(self, load: Load, arena: ArenaMap | None) -> bool:
        return True


class NeverLooksAtAll(ArenaMap):
    def holds(self, slot: SlotRef, hash_: bytes) -> bool:
        return True


class LooksAtTheHashOnly(ArenaMap):
    """Not at the generation: it may have been written anew meanwhile."""

    def holds(self, slot: SlotRef, hash_: bytes) -> bool:
        entry = read_entry(self._view, self._geometry, slot.number)
        return entry is not None and entry.hash == hash_


class WritesWithoutAReservation(ArenaMap):
    def is_reserved(self, slot: SlotRef) -> bool:
        return True


class WritesIntoAnyArena(WorkerSide):
    def _arena_of(self, plan: Plan) -> ArenaMap:
        arena = self._arena()
        return arena if arena is not None else super()._arena_of(plan)


class KeepsFailuresToItself(WorkerSide):
    def take_bad_blocks(self) -> set[int]:
        super().take_bad_blocks()
        return set()


class TellsOfFailedLoadsNever(WorkerSide):
    def take_finished_loads(self) -> tuple[set[str], set[str]]:
        ended, failed = super().take_finished_loads()
        return ended - failed, set()


class TellsOfFailedLoadsAsGood(WorkerSide):
    def take_finished_loads(self) -> tuple[set[str], set[str]]:
        return super().take_finished_loads()[0], set()


class TellsOfLoadsTwice(WorkerSide):
    last: frozenset[str] = frozenset()

    def take_finished_loads(self) -> tuple[set[str], set[str]]:
        ended, failed = super().take_finished_loads()
        again, self.last = self.last, frozenset(ended)
        return ended | again, failed


class TellsTooEarly(WorkerSide):
    """A load is over when it has been begun."""

    def take_finished_loads(self) -> tuple[set[str], set[str]]:
        ended, failed = super().take_finished_loads()
        early = {load.request for load, _ in self._loads_beside.values()}
        told = getattr(self, "_told", set())
        self._told = (told | early) - ended
        return (ended | early) - told, failed


class ReadsTheWrongPart(WorkerSide):
    """Another rank's."""

    def _copy(self, arena: ArenaMap, plan: Plan, piece: Piece) -> object:
        offsets = plan.part_offsets[piece.group]
        plan = dataclasses.replace(plan, part_offsets={piece.group: offsets[::-1]})
        return super()._copy(arena, plan, piece)


class EndsStoresAtOnce(WorkerSide):
    def take_outcome(self) -> Outcome:
        for number in list(self._stores):
            del self._stores[number]
            self._end(number, ok=True)
        return super().take_outcome()


class ForgetsFailedStores(WorkerSide):
    def _begin_store(self, plan: Plan, store: Store) -> UnderWay:
        under_way = super()._begin_store(plan, store)
        if under_way.ticket is None:
            self._stores.pop(store.number, None)
        return under_way

    def take_outcome(self) -> Outcome:
        for number in [number for number, copy in self._stores.items() if copy.ticket is None]:
            del self._stores[number]
        return super().take_outcome()


# The heartbeat


class OpensForEver(Health):
    @property
    def usable(self) -> bool:
        return self.state.value not in ("dormant", "stopped")


class NeverRecovers(Health):
    def _recover(self, why: str, boot: int, now_ms: int) -> None:
        if why == "first use":
            super()._recover(why, boot, now_ms)
