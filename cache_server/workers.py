"""Which engines there are, and which of their processes live.  Pure.

Two witnesses, and each is believed for one thing only.  Messages tell that a process works; their absence
makes it *silent*, and what it has reserved is quarantined: not given to anybody, not lost.  The kernel's lock
on its presence file tells that it exists; only when every lock of an engine is free is the engine *gone*, and
after a short grace (copies a device still has in flight) all that it held comes back.  A missing file is no
witness: it may have been removed under a process that lives.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate
from typing import NamedTuple

from cache_server.protocol.keys import canary_prefix, key_prefix, owner_of
from cache_server.protocol.messages import CANARY, Layout, Phase, Register
from cache_server.protocol.slots import SLOT_ALIGN, align


class WorkerState(Enum):
    WARMING = "warming"  # registered, and has said so itself or nothing yet
    READY = "ready"
    SILENT = "silent"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class GroupShape:
    """How one chunk of a group lies in its slot: one part after the other."""

    part_bytes: tuple[int, ...]
    part_offsets: tuple[int, ...]
    slot_bytes: int
    window: int


class Member:
    """One process of an engine."""

    def __init__(self, session: int, registration: Register, now_ms: int) -> None:
        self.session = session
        self.registration = registration
        self.phase = registration.phase
        self.registered_ms = now_ms
        self.heard_ms = now_ms
        self.pinged_ms = now_ms
        self.since_ms = now_ms  # in its phase, and not silent
        self.pings = 0
        self.progress = 0
        self.stored_ms: int | None = None  # the last chunk that it committed
        self.found_ms: int | None = None  # the last that it looked up and found
        self.gone_ms: int | None = None
        self.last_error = ""  # the last refusal of what it asked
        self.last_error_ms: int | None = None

    @property
    def alive(self) -> bool:
        return self.gone_ms is None

    def hear(self, now_ms: int, silent_after_ms: int) -> None:
        if now_ms - self.heard_ms > silent_after_ms:
            self.since_ms = now_ms
        self.heard_ms = now_ms

    def was_refused(self, code: str, detail: str, now_ms: int) -> None:
        self.last_error = f"{code}: {detail}"
        self.last_error_ms = now_ms

    def enter(self, phase: Phase, now_ms: int) -> None:
        if phase != self.phase:
            self.phase = phase
            self.since_ms = now_ms

    def state_since_ms(self, state: WorkerState, silent_after_ms: int) -> int:
        match state:
            case WorkerState.GONE:
                assert self.gone_ms is not None, "only then is it gone"
                return self.gone_ms
            case WorkerState.SILENT:
                return self.heard_ms + silent_after_ms
            case WorkerState.READY | WorkerState.WARMING:
                return self.since_ms

    def state(self, now_ms: int, silent_after_ms: int) -> WorkerState:
        if not self.alive:
            return WorkerState.GONE
        if self.phase == "warming" and not self.pings:
            return (
                WorkerState.WARMING
            )  # its heartbeat starts after warm-up; until then the lock speaks for it
        if now_ms - self.heard_ms > silent_after_ms:
            return WorkerState.SILENT
        return WorkerState.READY if self.phase == "ready" else WorkerState.WARMING


@dataclass(eq=False, slots=True)
class Engine:
    name: str
    owner: bytes  # in slot entries, and in hex before its processes' presence files
    members: dict[tuple[str, int], Member] = field(default_factory=dict)
    shapes: tuple[GroupShape, ...] = ()  # empty while not all ranks are registered
    incomplete: str = "no worker is registered"
    namespace: bytes = b""
    canary: bool = False

    _prefix: tuple[int, bytes] | None = None

    def prefix(self, epoch: int) -> bytes:
        if self._prefix is None or self._prefix[0] != epoch:
            geometry = [(shape.window, *shape.part_bytes) for shape in self.shapes]
            prefix = key_prefix(self.namespace, epoch, geometry)
            self._prefix = (epoch, canary_prefix(prefix) if self.canary else prefix)
        return self._prefix[1]

    def settle(self) -> None:
        """Computes the shape of the engine's chunks once every rank is there and they agree."""
        workers = [
            member.registration
            for (role, _), member in sorted(self.members.items())
            if role == "worker" and member.alive
        ]
        self._prefix = None
        self.namespace = workers[0].namespace if workers else b""
        self.incomplete = _why_incomplete(workers)
        self.shapes = () if self.incomplete else _shapes(workers)


class Seen(NamedTuple):
    """The presence files at one moment, by name."""

    living: frozenset[str]  # held by a process, or not to be asked
    known: frozenset[str]  # those, and the files of the dead

    @property
    def dead(self) -> frozenset[str]:
        return self.known - self.living


def mark_of(proof: str) -> str:
    """The part of a presence file's name that all of an engine's processes share: its owner in hex."""
    return proof.partition(".")[0]


class Registry:
    def __init__(self, new_session: Callable[[], int]) -> None:
        self.engines: dict[str, Engine] = {}
        self._new_session = new_session
        self._sessions: dict[int, tuple[Engine, Member]] = {}
        self._dead_since_ms: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def canaries(self) -> int:
        return sum(engine.canary for engine in self.engines.values())

    def member(self, session: int) -> tuple[Engine, Member] | None:
        return self._sessions.get(session)

    def has_place_of(self, registration: Register) -> bool:
        """Whether registering it adds nobody."""
        engine = self.engines.get(registration.engine)
        return engine is not None and (registration.role, registration.rank) in engine.members

    def register(self, registration: Register, now_ms: int) -> Member:
        """The same again is a refresh and keeps its session; anything else takes its predecessor's place."""
        engine = self.engines.get(registration.engine)
        if engine is None:
            engine = Engine(registration.engine, owner_of(registration.engine))
            engine.canary = CANARY in registration.features
            self.engines[engine.name] = engine
        place = (registration.role, registration.rank)
        member = engine.members.get(place)
        if member is not None and _same_process(member.registration, registration):
            member.enter(registration.phase, now_ms)
            member.heard_ms, member.gone_ms = now_ms, None
        else:
            if member is not None:
                del self._sessions[member.session]
            member = Member(self._new_session(), registration, now_ms)
            engine.members[place] = member
            self._sessions[member.session] = (engine, member)
            self._drop_dead_of_others(engine, registration.instance)
        engine.settle()
        return member

    def _drop_dead_of_others(self, engine: Engine, instance: str) -> None:
        """An engine that starts anew with fewer processes has no use for its predecessor's places."""
        for place, member in list(engine.members.items()):
            if member.gone_ms is not None and member.registration.instance != instance:
                del engine.members[place], self._sessions[member.session]

    def unregister(self, session: int) -> Engine | None:
        """-> the engine, if that was its last member"""
        engine, member = self._sessions.pop(session)
        del engine.members[member.registration.role, member.registration.rank]
        engine.settle()
        if engine.members:
            return None
        del self.engines[engine.name]
        return engine

    def observe(self, locked: frozenset[str], now_ms: int) -> None:
        """`locked`: the presence files that live processes hold."""
        for engine, member in self._sessions.values():
            if member.alive and member.registration.proof not in locked:
                member.gone_ms = now_ms
                engine.settle()

    def dead_owners(
        self, owners: set[bytes], locked: frozenset[str], now_ms: int, grace_ms: int
    ) -> list[bytes]:
        """Of `owners`, those all of whose processes have been dead for `grace_ms`."""
        living = {mark_of(name) for name in locked}
        dead = {owner for owner in owners if owner.hex() not in living}
        self._dead_since_ms = {owner: self._dead_since_ms.get(owner, now_ms) for owner in sorted(dead)}
        return [owner for owner, since_ms in self._dead_since_ms.items() if now_ms - since_ms >= grace_ms]

    def remove(self, owner: bytes) -> Engine | None:
        for engine in self.engines.values():
            if engine.owner == owner:
                for member in engine.members.values():
                    del self._sessions[member.session]
                return self.engines.pop(engine.name)
        return None


def _same_process(old: Register, new: Register) -> bool:
    return (old.proof, old.world, old.namespace, old.layout) == (
        new.proof,
        new.world,
        new.namespace,
        new.layout,
    )


def _layouts(workers: list[Register]) -> list[Layout]:
    return [worker.layout for worker in workers if worker.layout is not None]


def _why_incomplete(workers: list[Register]) -> str:
    world = workers[0].world if workers else 1
    if len(workers) != world:
        return f"{len(workers)} of {world} workers are registered"
    if any((worker.namespace, worker.world) != (workers[0].namespace, world) for worker in workers):
        return "its workers differ in namespace or world size"
    layouts = _layouts(workers)
    if any(
        layout.groups != same.groups for layout in layouts for same in layouts if layout.part == same.part
    ):
        return "workers that share a part differ in its groups"
    if any(
        (layout.parts, _windows(layout)) != (layouts[0].parts, _windows(layouts[0])) for layout in layouts
    ):
        return "its workers differ in their cache groups"
    held = {layout.part for layout in layouts}
    if len(held) != layouts[0].parts:
        return f"its workers hold {len(held)} of {layouts[0].parts} parts"
    return ""


def _shapes(workers: list[Register]) -> tuple[GroupShape, ...]:
    by_part = {layout.part: layout for layout in _layouts(workers)}
    parts = [by_part[part] for part in sorted(by_part)]
    return tuple(
        _shape(tuple(layout.groups[group].part_bytes for layout in parts), window)
        for group, window in enumerate(_windows(parts[0]))
    )


def _windows(layout: Layout) -> list[int]:
    return [group.window for group in layout.groups]


def _shape(part_bytes: tuple[int, ...], window: int) -> GroupShape:
    ends = list(accumulate(align(length, SLOT_ALIGN) for length in part_bytes))
    return GroupShape(part_bytes, (0, *ends[:-1]), ends[-1], window)
