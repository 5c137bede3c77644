"""What must hold in every world: while it goes on, when it is idle, and of what lies in the arena."""

from collections import Counter
from typing import TYPE_CHECKING

from cache_server.protocol import messages as m
from cache_server.protocol.slots import SLOT_ALIGN, SlotState, align, read_entry
from lmconnector.requests import Phase
from sim.whole.bounds import Bounds
from sim.whole.engine import Engine
from sim.whole.gates import Gates
from sim.whole.model import Model
from sim.whole.truth import cell
from sim.whole.vllm_request import Request, Results, Status, Step

if TYPE_CHECKING:
    from sim.whole.system import System

LEASES_LAST_MS = 20_000  # those of worlds whose leases don't run out
SETTLED_MS = 3_000
EPOCHS_MAX = 20
HARMLESS = {"cut", "disconnect", "part", "half open", "stall", "freeze"}  # to what is in the cache
WAITS_MAX = 2  # deadlines that a request waits for the same load by others


class Checks:
    def __init__(self, system: "System") -> None:
        self._system = system
        self.gates = Gates(system)
        self._bounds = Bounds(system)
        self.seen: Counter[str] = Counter()  # of what vLLM does
        self._looked_up_ms: dict[tuple[str, str], int] = {}  # (engine, lease) -> when
        self._models: dict[bytes, tuple[Model, int]] = {}  # key prefix -> what runs under it, its weights
        for model in system.setup.models:
            for epoch in range(EPOCHS_MAX):
                self._models[model.prefix(epoch)] = (model, model.weights + epoch)
        self._waits: dict[
            str, tuple[int, int, int]
        ] = {}  # for another's load: last step, its time, ms in all

    # While it goes on

    def on_answer(self, engine: Engine, request: Request, tokens: int | None, begun_ms: int) -> None:
        now_ms, options = self._now_ms, engine.options
        waited_ms = now_ms - begun_ms
        others = len(self._system.engines)
        assert waited_ms <= others * max(options.lookup_wait_ms, 1), (
            f"a step waits {waited_ms} ms for a lookup"
        )
        record = engine.side._records[request.request_id]
        if tokens is not None:
            self._waits.pop(request.request_id, None)
        elif record.phase is Phase.LOOKING:
            delay_ms = now_ms - self._looked_up_ms[engine.name, record.lease]
            assert delay_ms <= options.lookup_deadline_ms + waited_ms, f"{delay_ms} ms wait for a lookup"
        else:
            # For another's load.  It does not count while it is not asked: all places are taken.
            step = engine.scheduler.step_number
            asked_step, asked_ms, delay_ms = self._waits.get(request.request_id, (step, now_ms, 0))
            delay_ms += now_ms - asked_ms if step <= asked_step + 1 else 0
            self._waits[request.request_id] = (step, now_ms, delay_ms)
            assert delay_ms <= WAITS_MAX * options.request_deadline_ms, (
                f"{delay_ms} ms wait for another's load"
            )

    def on_sent(self, engine: Engine, request: m.Request) -> None:
        if isinstance(request, m.Lookup):
            self._looked_up_ms[engine.name, request.request] = self._now_ms

    @property
    def _now_ms(self) -> int:
        """Time in which nobody stood still in the midst of something."""
        return self._system.time.now_ms - self._system.time.stalled_ms

    def on_allocated(self, engine: Engine, request: Request, tokens: int) -> None:
        if tokens:
            self._system.note("load", engine.name, request.request_id, tokens)
            self._system.perhaps_abort_loading(engine, request)

    def on_reset(self, engine: Engine) -> None:
        self._system.note("weights", engine.name, engine.weights)

    def on_abort(self, request: Request) -> None:
        self.seen["aborted"] += 1
        self.seen["aborted while loading"] += request.status is Status.LOADING

    def on_tick(self) -> None:
        """Of the server."""
        self.gates.sample()
        self._bounds.check_server()

    def on_step(self, engine: Engine, step: Step) -> None:
        self.gates.look(engine.members[0])
        self._bounds.check_engine(engine)
        self.seen["preempted"] += len(step.preempted)
        if step.parts:
            parts = [(part.request_id, part.computed, part.tokens) for part in step.parts.values()]
            self._system.note("step", engine.name, step.number, parts)

    def on_results(self, engine: Engine, step: Step, results: Results) -> None:
        self.seen["load told as failed"] += len(results.failed)
        self.seen["blocks told as bad"] += len(results.bad_blocks)
        if step.parts or results.loaded or results.bad_blocks:
            told = (results.sampled, results.loaded, results.failed, sorted(results.bad_blocks))
            self._system.note("results", engine.name, step.number, *told)
        for part in step.parts.values():  # those that load come first
            if results.bad_blocks & {block for table in part.tables for block in table}:
                self._system.perhaps_abort_failed(engine, part.request_id)
                break

    def stuck(self) -> list[object]:
        return [
            (engine.name, request.request_id, request.status, engine.side._records.get(request.request_id))
            for engine in self._system.engines
            for request in engine.scheduler.requests.values()
        ]

    # When nothing goes on any more

    def leases_released(self) -> None:
        """Those that were granted after all messages came through again; older ones may have to expire."""
        service = self._system.server.service
        assert service is not None
        settled_ms = self._system.healed_ms + SETTLED_MS
        for (engine, request), lease in service.leases._leases.items():
            granted_ms = lease.expires_ms - service.limits.lease_ms
            assert granted_ms < settled_ms, f"{engine} keeps the lease of {request}, and is idle"

    def at_rest(self) -> None:
        for engine in self._system.engines:
            self._check_scheduler(engine)
            self._check_workers(engine)
            self._check_blocks(engine)
            self._check_stock(engine)
        for engine in self._system.dead:
            assert not self._reserved(engine), f"{engine.name} is dead, and slots are still its own"
        self._check_server()
        self._check_content()

    def _check_scheduler(self, engine: Engine) -> None:
        side = engine.side
        left = {
            "records": side._records,
            "requests": side._requests,
            "storing": side.storing,
            "jobs": side.jobs._jobs,
            "loads": side._loading._loads,
            "releases": side._releases,
            "loading beside": side._loading._beside,
            "open stores": side.stores._open,
            "pending requests": engine.client._pending,
        }
        left = {what: value for what, value in left.items() if value}
        assert not left, f"{engine.name} is idle, and of its scheduler's side is left: {left}"

    def _check_workers(self, engine: Engine) -> None:
        for worker in engine.workers:
            left = [
                worker._loads_at_once,
                worker._loads_beside,
                worker._stores,
                worker._bad_blocks,
                worker._outcome.ended,
            ]
            assert not any(left), f"{engine.name} is idle, and of a worker's side is left: {left}"

    def _check_blocks(self, engine: Engine) -> None:
        pool = engine.scheduler.pool
        assert not pool.held, f"{engine.name} is idle, and blocks are held: {dict(pool.held)}"
        assert len(pool.free) == len(pool.blocks) - 1, f"{engine.name} is idle, and blocks are lost"

    def _reserved(self, engine: Engine) -> set[tuple[int, int]]:
        service = self._system.server.service
        assert service is not None
        reserved = service.storage.arena.reserved.get(engine.owner, {})
        return {(generation, number) for number, generation in reserved.items()}

    def _check_stock(self, engine: Engine) -> None:
        stock = engine.side.stores.stock
        slots = [*stock._out, *(slot for slots in stock._slots for slot in slots)]
        ours = [(slot.generation, slot.number) for slot in slots]
        assert not stock._out, f"{engine.name} is idle, and slots are out: {stock._out}"
        assert len(ours) == len(set(ours)), f"{engine.name} has a slot twice"
        theirs = self._reserved(engine)
        drawn = self._system.drawn
        dies = any(what in ("kill", "restart", "tear a write") for _, what in drawn.events)
        # A request came twice, and one of its replies was lost or never made: the engine has the other.
        twice = drawn.duplicate and (drawn.loss or drawn.garble or dies)
        if stock._unsure or twice:  # when it next tells what it holds, they come back
            theirs &= set(ours)
        assert set(ours) == theirs, f"{engine.name} knows of the slots {ours}, the server of {theirs}"

    def _check_server(self) -> None:
        service = self._system.server.service
        assert service is not None
        assert not len(service.leases), f"{len(service.leases)} leases are left"
        index, arena = service.storage.index, service.storage.arena
        chunks = [chunk for space in index.spaces for chunk in space.chunks.values()]
        assert len(chunks) == len(index)
        assert not any(chunk.leases for chunk in chunks), "a chunk is leased by nobody"
        usage = arena.usage()
        parts = usage.unpopulated + usage.free + usage.reserved + usage.committed + usage.waste
        assert parts == usage.capacity, f"the arena does not add up: {usage}"
        assert usage.committed == sum(chunk.space.slot_bytes for chunk in chunks), "index and arena differ"

    def _check_content(self) -> None:
        """What is committed under a key is what the key names."""
        geometry, file = self._system.server.geometry, self._system.server.file
        before = self._digests_before()
        for number in range(geometry.slabs * geometry.entries_per_slab):
            entry = read_entry(file, geometry, number)
            if entry is None or entry.state != SlotState.COMMITTED:
                continue
            model, weights = self._models[entry.prefix]
            digests = [entry.hash]
            while len(digests) < model.chunk_tokens:
                digests.append(before[digests[-1]])
            for part in range(model.parts):
                at = entry.offset + part * align(model.part_bytes, SLOT_ALIGN)
                expected = b"".join([cell(one, weights, entry.group, part) for one in reversed(digests)])
                found = file[at : at + model.part_bytes]
                assert found == expected, f"slot {number} holds other bytes than its key names"

    def leases_held(self) -> None:
        """What is leased stays where it is, if nobody has emptied the cache."""
        system = self._system
        faults = system.drawn
        emptied = {what for _, what in faults.events} - HARMLESS
        # By the workers, soon after the server counts on it.
        mapped = faults.registration_ms_max < 10 and not faults.loss and not faults.garble
        if mapped and not emptied and system.setup.limits.lease_ms > LEASES_LAST_MS:
            stale = system.counts["drops/load_stale"]
            assert not stale, f"{stale} loads found something else in a slot that was leased"

    def _digests_before(self) -> dict[bytes, bytes]:
        before: dict[bytes, bytes] = {}
        for request in self._system.asked:
            before |= dict(zip(request.prefix.digests, [b"", *request.prefix.digests], strict=False))
        return before
