"""A whole service in memory, engines that talk to it, and chains of hashes."""

import itertools
from collections.abc import Sequence
from hashlib import sha256
from typing import TypeVar

from cache_server.arena import Arena
from cache_server.eviction import Lru
from cache_server.index import Index
from cache_server.limits import Limits
from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef, key_prefix, owner_of, pack_slot_names, split_slot_refs
from cache_server.protocol.slots import (
    FORMAT_VERSION,
    SLAB_POPULATED,
    Geometry,
    record_boot,
    write_header,
    write_slab,
)
from cache_server.service import Identity, Service
from cache_server.storage import Storage
from cache_server.workers import Registry, Seen

KIB = 1 << 10
SLAB_BYTES = 16 * KIB  # four of the smallest slots
TOKEN = "the admin's word"
ARENA_ID = b"an arena's ident"

R = TypeVar("R", bound=m.Reply)


class RefusedError(Exception):
    """What the service refused, by its code."""

    def __init__(self, refusal: m.Refused) -> None:
        super().__init__(f"{refusal.code}: {refusal.detail}")
        self.code = refusal.code


def chain(length: int, name: str = "chain") -> list[bytes]:
    """The hashes of a prompt's chunks; equal names share all of the shorter one."""
    return [sha256(f"{name} {number}".encode()).digest() for number in range(length)]


def new_file(geometry: Geometry, *, populated: bool = True) -> memoryview:
    """A fresh arena file, its data included."""
    file = memoryview(bytearray(geometry.file_bytes))
    write_header(file, geometry, ARENA_ID)
    if populated:
        for slab in range(geometry.slabs):
            write_slab(file, geometry, slab, SLAB_POPULATED)
    return file


class Locks(set[str]):
    """The presence files that are held; `known`: those, and the ones that the dead have left behind."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[str] = set()

    def add(self, name: str) -> None:
        self.known.add(name)
        super().add(name)

    def seen(self) -> Seen:
        return Seen(frozenset(self), frozenset(self.known))


class World:
    """A server and what it lives in: the arena file, the locks that are held, the time."""

    arena_class = Arena

    def __init__(
        self,
        capacity_bytes: int = 8 * SLAB_BYTES,
        slab_bytes: int = SLAB_BYTES,
        limits: Limits | None = None,
        *,
        populated: bool = True,
    ) -> None:
        self.geometry = Geometry(capacity_bytes, slab_bytes)
        self.file = new_file(self.geometry, populated=populated)
        self.limits = limits or Limits()
        self.locked = Locks()
        self.now_ms = 1_000
        self._sessions = itertools.count(1)
        self.service = self.start()

    def start(self) -> Service:
        """A new server takes over what the one before, if any, has left behind; as after kill -9."""
        boots = record_boot(self.file, 0, 0)
        arena = self.arena_class(self.file, self.geometry, boots)
        told = m.Arena("arena", ARENA_ID, FORMAT_VERSION, self.geometry.file_bytes, arena.usage().capacity)
        self.service = Service(
            Identity(boots, TOKEN, told),
            Storage(arena, Index(Lru)),
            self.limits,
            Registry(lambda: next(self._sessions)),
            self.locked.__contains__,
        )
        return self.service

    @property
    def arena(self) -> Arena:
        return self.service.storage.arena

    def ask(self, request: m.Request, expected: type[R]) -> R:
        reply = self.service.handle(request, self.now_ms)
        if isinstance(reply, m.Refused):
            raise RefusedError(reply)
        assert isinstance(reply, expected), reply
        return reply

    def pass_ms(self, passed_ms: int) -> list[str]:
        """-> the engines found gone"""
        self.now_ms += passed_ms
        self.service.tick(self.now_ms)
        return self.service.observe(self.locked.seen(), self.now_ms)


def make_service(capacity_bytes: int = 8 * SLAB_BYTES, limits: Limits | None = None) -> World:
    return World(capacity_bytes, limits=limits)


class Peer:
    """An engine: `ranks` workers that hold one part each of every chunk, `groups` on each of them."""

    def __init__(
        self,
        world: World,
        name: str = "engine",
        groups: Sequence[m.Group] = (m.Group(4 * KIB),),
        namespace: bytes = b"model",
        ranks: int = 1,
    ) -> None:
        self.world = world
        self.name = name
        self.groups = tuple(groups)
        self.namespace = namespace
        self.ranks = ranks
        self.owner = owner_of(name)
        self.sessions: dict[int, int] = {}
        self.proofs: dict[int, str] = {}
        self._lives = itertools.count(1)

    @property
    def prefix(self) -> bytes:
        """What the service puts before this engine's hashes."""
        geometry = [(group.window, *[group.part_bytes] * self.ranks) for group in self.groups]
        return key_prefix(self.namespace, 0, geometry)

    def slot_bytes(self, group: int = 0) -> int:
        return self.ranks * -(-self.groups[group].part_bytes // 4096) * 4096

    def registration(self, rank: int = 0) -> m.Register:
        return m.Register(
            id=1, version_min=m.VERSION_MIN, version_max=m.VERSION_MAX, engine=self.name, role="worker",
            rank=rank, world=self.ranks, namespace=self.namespace, proof=self.proofs[rank], phase="ready",
            layout=m.Layout(groups=self.groups, part=rank, parts=self.ranks),
        )  # fmt: skip

    def spawn(self, rank: int = 0) -> None:
        """A new process, which has locked its presence file."""
        self.proofs[rank] = f"{self.owner.hex()}.{rank}.{next(self._lives)}"
        self.world.locked.add(self.proofs[rank])

    def kill(self, rank: int = 0) -> None:
        self.world.locked.discard(self.proofs[rank])

    def register(self, rank: int = 0) -> m.Registered:
        registered = self.world.ask(self.registration(rank), m.Registered)
        self.sessions[rank] = registered.session
        return registered

    def start(self) -> "Peer":
        for rank in range(self.ranks):
            self.spawn(rank)
            self.register(rank)
        return self

    def unregister(self, rank: int = 0) -> m.Done:
        return self.world.ask(m.Unregister(id=1, session=self.sessions[rank]), m.Done)

    def ping(self, rank: int = 0) -> m.Pong:
        return self.world.ask(m.Ping(id=1, session=self.sessions[rank]), m.Pong)

    def reserve(self, count: int, group: int = 0) -> list[SlotRef]:
        request = m.Reserve(id=1, session=self.sessions[0], group=group, count=count)
        return split_slot_refs(self.world.ask(request, m.Reserved).slots)

    def commit(
        self, hashes: Sequence[bytes], slots: Sequence[SlotRef], parent: bytes = b"", group: int = 0
    ) -> bytes:
        request = m.Commit(
            id=1, session=self.sessions[0], group=group, parent=parent,
            hashes=b"".join(hashes), slots=pack_slot_names(slots),
        )  # fmt: skip
        return self.world.ask(request, m.Committed).outcomes

    def store(self, hashes: Sequence[bytes], parent: bytes = b"", group: int = 0) -> list[SlotRef]:
        """All of them are new."""
        slots = self.reserve(len(hashes), group)
        assert self.commit(hashes, slots, parent, group) == bytes([m.Outcome.STORED] * len(hashes))
        return slots

    def abort(self, slots: Sequence[SlotRef], *, all_but: bool = False) -> int:
        names = pack_slot_names(slots)
        request = m.Abort(id=1, session=self.sessions[0], slots=names, all_but=all_but)
        return self.world.ask(request, m.Done).count

    def lookup(self, hashes: Sequence[bytes], request: str = "request") -> m.Found:
        lookup = m.Lookup(id=1, session=self.sessions[0], request=request, hashes=b"".join(hashes))
        return self.world.ask(lookup, m.Found)

    def release(self, *requests: str) -> int:
        return self.world.ask(m.Release(id=1, session=self.sessions[0], requests=requests), m.Done).count

    def clear(self, token: str = "") -> int:
        return self.world.ask(m.Clear(id=1, session=self.sessions[0], token=token), m.Done).count
