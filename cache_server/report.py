"""The server's state as plain values, for STATUS, `/status`, `/metrics` and the command line.  Pure."""

import msgspec

from cache_server.counters import Counters
from cache_server.service import Service
from cache_server.workers import Engine, Member, WorkerState


class ArenaReport(msgspec.Struct, frozen=True):
    """`free + used + quarantined == capacity`, and committed + stocked + waste == used."""

    path: str
    id: str
    capacity_bytes: int
    free_bytes: int
    used_bytes: int
    quarantined_bytes: int
    committed_bytes: int
    stocked_bytes: int
    waste_bytes: int  # the ends of slabs, too short for a slot
    unpopulated_bytes: int  # of the free ones


class SlotReport(msgspec.Struct, frozen=True):
    """A slot size in use, and how many of it are free."""

    slot_bytes: int
    free: int


class ChunkReport(msgspec.Struct, frozen=True):
    stored: int
    restored: int
    evicted: int


class LeaseReport(msgspec.Struct, frozen=True):
    outstanding: int
    granted: int
    released: int
    expired: int


class Latency(msgspec.Struct, frozen=True):
    """`counts` beside the bounds in `counters.BUCKETS_US`, and those beyond the last."""

    counts: tuple[int, ...]
    sum_us: int


class WorkerReport(msgspec.Struct, frozen=True):
    engine: str
    role: str
    rank: int
    world: int
    pid: int
    state: str
    phase: str
    registered_s: int
    canary: bool
    silent_ms: int
    pings: int
    progress: int
    stock_bytes: int
    leases: int
    incomplete: str


class Status(msgspec.Struct, frozen=True):
    boot: str
    pid: int
    state: str
    uptime_s: int
    population_failure: str
    arena: ArenaReport
    chunks: ChunkReport
    leases: LeaseReport
    workers: dict[str, int]  # how many in each state
    counters: dict[str, int]
    refused: dict[str, int]
    latency: dict[str, Latency]
    slots: tuple[SlotReport, ...]
    worker_rows: tuple[WorkerReport, ...] = ()


def describe(service: Service, now_ms: int, pid: int, uptime_s: int, population_failure: str) -> Status:
    storage, leases = service.storage, service.leases
    return Status(
        boot=f"{service.boot:016x}",
        pid=pid,
        state="draining" if service.draining else "paused" if service.paused else "ready",
        uptime_s=uptime_s,
        population_failure=population_failure,
        arena=_arena(service, now_ms),
        chunks=ChunkReport(len(storage.index) - storage.canary_chunks, storage.restored, storage.evicted),
        leases=LeaseReport(len(leases), leases.granted, leases.released, leases.expired),
        workers=_worker_states(service, now_ms),
        counters=_plain_counters(service.counters),
        refused=dict(service.counters.refused),
        latency={
            op: Latency(tuple(histogram.counts), histogram.sum_us)
            for op, histogram in service.counters.latency.items()
        },
        slots=tuple(
            SlotReport(size, sum(len(slab.free) for slab in storage.arena.slabs_of(size) if not slab.closed))
            for size in storage.arena.slot_sizes
        ),
    )


def worker_rows(service: Service, now_ms: int) -> tuple[WorkerReport, ...]:
    return tuple(
        _worker(service, engine, member, now_ms)
        for engine in service.registry.engines.values()
        for member in engine.members.values()
    )


def _arena(service: Service, now_ms: int) -> ArenaReport:
    usage = service.storage.arena.usage()
    quarantined = quarantined_bytes(service, now_ms)
    stocked = usage.reserved - quarantined
    return ArenaReport(
        path=service.identity.arena.path,
        id=service.identity.arena.id.hex(),
        capacity_bytes=usage.capacity,
        free_bytes=usage.free + usage.unpopulated,
        used_bytes=usage.committed + stocked + usage.waste,
        quarantined_bytes=quarantined,
        committed_bytes=usage.committed,
        stocked_bytes=stocked,
        waste_bytes=usage.waste,
        unpopulated_bytes=usage.unpopulated,
    )


def quarantined_bytes(service: Service, now_ms: int) -> int:
    """Reserved by engines that can't be heard: nobody gets it before they speak or are proven dead."""
    by_owner = {engine.owner: engine for engine in service.registry.engines.values()}
    arena = service.storage.arena
    return sum(
        arena.reserved_bytes(owner)
        for owner in arena.reserved
        if owner not in by_owner or not _audible(service, by_owner[owner], now_ms)
    )


def _audible(service: Service, engine: Engine, now_ms: int) -> bool:
    states = {member.state(now_ms, service.limits.silent_after_ms) for member in engine.members.values()}
    return not states & {WorkerState.SILENT, WorkerState.GONE}


def _worker_states(service: Service, now_ms: int) -> dict[str, int]:
    counts = {state.value: 0 for state in WorkerState}
    for engine in service.registry.engines.values():
        for member in () if engine.canary else engine.members.values():
            counts[member.state(now_ms, service.limits.silent_after_ms).value] += 1
    return counts


def _plain_counters(counters: Counters) -> dict[str, int]:
    return {name: value for name in Counters.__slots__ if isinstance(value := getattr(counters, name), int)}


def _worker(service: Service, engine: Engine, member: Member, now_ms: int) -> WorkerReport:
    registration = member.registration
    return WorkerReport(
        engine=engine.name,
        role=registration.role,
        rank=registration.rank,
        world=registration.world,
        pid=registration.pid,
        state=member.state(now_ms, service.limits.silent_after_ms).value,
        phase=member.phase,
        registered_s=(now_ms - member.registered_ms) // 1000,
        canary=engine.canary,
        silent_ms=now_ms - member.heard_ms,
        pings=member.pings,
        progress=member.progress,
        stock_bytes=service.storage.arena.reserved_bytes(engine.owner),
        leases=service.leases.of(engine.name),
        incomplete=engine.incomplete,
    )
