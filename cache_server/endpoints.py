"""Engines, their processes and the tiers: the health of each, and what it means for the server.  Pure."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import islice

import msgspec

from cache_server.service import Service
from cache_server.workers import Engine, Member, WorkerState

ROWS_MAX = 256  # of workers, and of engines; those in a worse state first
MEMORY = "memory"
_BY_BADNESS = (WorkerState.GONE, WorkerState.SILENT, WorkerState.WARMING, WorkerState.READY)
_BADNESS = {state: badness for badness, state in enumerate(_BY_BADNESS)}


class EngineRow(msgspec.Struct, frozen=True, kw_only=True):
    """Times are the server's monotonic ms; None: not yet."""

    engine: str
    state: str
    since_ms: int
    reason: str
    required: bool
    canary: bool
    workers: int
    registered_ms: int
    pinged_ms: int | None
    stored_ms: int | None
    found_ms: int | None
    last_error: str  # the last refusal of what it asked; empty: none
    last_error_ms: int | None


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    engine: str
    role: str
    rank: int
    world: int
    pid: int
    state: str
    since_ms: int
    reason: str
    required: bool
    canary: bool
    registered_ms: int
    pinged_ms: int | None
    stored_ms: int | None
    found_ms: int | None
    last_error: str  # the last refusal of what it asked; empty: none
    last_error_ms: int | None


class TierRow(msgspec.Struct, frozen=True, kw_only=True):
    tier: str
    state: str  # ready, degraded, failed
    since_ms: int
    reason: str
    required: bool


class Endpoints(msgspec.Struct, frozen=True, kw_only=True):
    engines: tuple[EngineRow, ...]
    workers: tuple[WorkerRow, ...]
    tiers: tuple[TierRow, ...]
    engine_counts: dict[str, int]  # by state, canaries not among them
    unmet: str  # why what readiness needs is not there
    failed_tier: str
    impaired: str  # what is optional and not well
    proven_ms: int | None  # when real traffic has last gone the whole way, store and load


class Requirement(msgspec.Struct, frozen=True):
    patterns: tuple[str, ...] = ()
    count: str = "all"  # or "any", or a number

    def names(self, engine: str) -> bool:
        return any(fnmatchcase(engine, pattern) for pattern in self.patterns)

    def unmet(self, engines: Sequence[tuple[str, WorkerState]]) -> str:
        """Empty when it is met; nothing at all meets no requirement."""
        if not self.patterns:
            return ""
        required = [(name, state) for name, state in engines if self.names(name)]
        good = sum(state is WorkerState.READY for _, state in required)
        needed = {"all": max(1, len(required)), "any": 1}.get(self.count) or int(self.count)
        absent = [each for each in self.patterns if not any(fnmatchcase(name, each) for name, _ in required)]
        if self.count == "all" and absent:
            return f"no engine named {absent[0]!r} is registered"
        if good >= needed:
            return ""
        bad = [f": {name} is {state.value}" for name, state in required if state is not WorkerState.READY]
        return f"{good} of {len(required)} required engines are ready, {needed} must be{''.join(bad[:1])}"


class Tiers:
    """Remembers since when each tier is in its state."""

    def __init__(self) -> None:
        self._rows: dict[str, TierRow] = {}

    def observe(self, tier: str, state: str, reason: str, now_ms: int) -> None:
        known = self._rows.get(tier)
        since_ms = known.since_ms if known is not None and known.state == state else now_ms
        self._rows[tier] = TierRow(tier=tier, state=state, since_ms=since_ms, reason=reason, required=True)

    def observe_memory(self, service: Service, failure: str, now_ms: int) -> None:
        usage = service.storage.arena.usage()
        if not failure:
            self.observe(MEMORY, "ready", "", now_ms)
        elif usage.unpopulated < usage.capacity:
            self.observe(MEMORY, "degraded", f"a part of it can't be had: {failure}", now_ms)
        else:
            self.observe(MEMORY, "failed", f"nothing of it can be had: {failure}", now_ms)

    def rows(self) -> tuple[TierRow, ...]:
        return tuple(self._rows.values())


def describe(service: Service, requirement: Requirement, tiers: Tiers, now_ms: int) -> Endpoints:
    """Of many engines the state of each is computed, and rows are made of the worst."""
    silent_after_ms = service.limits.silent_after_ms
    standing = [
        (engine, *_state(engine, silent_after_ms, now_ms)) for engine in service.registry.engines.values()
    ]
    real = [(engine.name, state) for engine, state, _ in standing if not engine.canary]
    counts = {state.value: 0 for state in WorkerState}
    for _, state in real:
        counts[state.value] += 1
    worst = sorted(standing, key=lambda each: _BADNESS[each[1]])[:ROWS_MAX]
    engines = tuple(_engine(*each, requirement, silent_after_ms, now_ms) for each in worst)
    processes = (row for engine, _, _ in worst for row in _workers(service, engine, requirement, now_ms))
    stored_ms, found_ms = service.stored_ms, service.found_ms
    tier_rows = tiers.rows()
    return Endpoints(
        engines=engines,
        workers=tuple(islice(processes, ROWS_MAX)),
        tiers=tier_rows,
        engine_counts=counts,
        unmet=requirement.unmet(real),
        failed_tier=next((f"{row.tier}: {row.reason}" for row in tier_rows if row.state == "failed"), ""),
        impaired=_impaired(engines, tier_rows),
        proven_ms=None if stored_ms is None or found_ms is None else min(stored_ms, found_ms),
    )


def _state(
    engine: Engine, silent_after_ms: int, now_ms: int
) -> tuple[WorkerState, list[tuple[Member, WorkerState]]]:
    """That of its worst process; ready only when all are there."""
    members = [(member, member.state(now_ms, silent_after_ms)) for member in engine.members.values()]
    state = min((own for _, own in members), key=_BADNESS.__getitem__, default=WorkerState.WARMING)
    if state is WorkerState.READY and not engine.shapes:
        state = WorkerState.WARMING
    return state, members


def _impaired(engines: Iterable[EngineRow], tiers: Iterable[TierRow]) -> str:
    for tier in tiers:
        if tier.state == "degraded":
            return f"{tier.tier}: {tier.reason}"
    for row in engines:
        bad = row.state in (WorkerState.SILENT.value, WorkerState.GONE.value)
        if bad and not row.required and not row.canary:
            return f"engine {row.engine}: {row.reason}"
    return ""


def _engine(
    engine: Engine,
    state: WorkerState,
    members: Sequence[tuple[Member, WorkerState]],
    requirement: Requirement,
    silent_after_ms: int,
    now_ms: int,
) -> EngineRow:
    registered_ms = min((each.registered_ms for each, _ in members), default=now_ms)
    erring = max((each for each, _ in members), key=lambda each: each.last_error_ms or 0, default=None)
    in_state = [each.state_since_ms(own, silent_after_ms) for each, own in members if own is state]
    return EngineRow(
        engine=engine.name,
        state=state.value,
        since_ms=max(in_state, default=registered_ms),
        reason=_engine_reason(engine, [own for _, own in members], state),
        required=not engine.canary and requirement.names(engine.name),
        canary=engine.canary,
        workers=len(members),
        registered_ms=registered_ms,
        pinged_ms=_latest(each.pinged_ms for each, _ in members if each.pings),
        stored_ms=_latest(each.stored_ms for each, _ in members),
        found_ms=_latest(each.found_ms for each, _ in members),
        last_error=erring.last_error if erring else "",
        last_error_ms=erring.last_error_ms if erring else None,
    )


def _engine_reason(engine: Engine, states: Sequence[WorkerState], state: WorkerState) -> str:
    if state is WorkerState.READY:
        return ""
    count = sum(each is state for each in states)
    return f"{count} of {len(states)} processes {state.value}" if count else engine.incomplete


def _workers(service: Service, engine: Engine, requirement: Requirement, now_ms: int) -> Iterable[WorkerRow]:
    silent_after_ms = service.limits.silent_after_ms
    required = not engine.canary and requirement.names(engine.name)
    for member in engine.members.values():
        state = member.state(now_ms, silent_after_ms)
        registration = member.registration
        yield WorkerRow(
            engine=engine.name,
            role=registration.role,
            rank=registration.rank,
            world=registration.world,
            pid=registration.pid,
            state=state.value,
            since_ms=member.state_since_ms(state, silent_after_ms),
            reason=_worker_reason(member, state),
            required=required,
            canary=engine.canary,
            registered_ms=member.registered_ms,
            pinged_ms=member.pinged_ms if member.pings else None,
            stored_ms=member.stored_ms,
            found_ms=member.found_ms,
            last_error=member.last_error,
            last_error_ms=member.last_error_ms,
        )


def _worker_reason(member: Member, state: WorkerState) -> str:
    match state:
        case WorkerState.GONE:
            return "its process is dead: the lock on its presence file is free"
        case WorkerState.SILENT:
            return "not heard of; its process lives"
        case WorkerState.WARMING:
            return "has not pinged yet" if not member.pings else "says that it warms up"
        case WorkerState.READY:
            return ""


def _latest(times: Iterable[int | None]) -> int | None:
    return max((time for time in times if time is not None), default=None)
