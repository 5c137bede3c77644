"""The service against a plain dict, through stores, evictions, leases, deaths and restarts."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise, product
from typing import TypeVar

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from cache_server import report
from cache_server.arena import Arena
from cache_server.index import Chunk
from cache_server.limits import Limits
from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef, split_slot_refs
from cache_server.protocol.messages import Code, Outcome
from cache_server.protocol.slots import ENTRY_BYTES, SLABS_AT, SlotState, holds, read_entry, read_slab
from kit import KIB, SLAB_BYTES, TOKEN, Peer, RefusedError, World, chain

T = TypeVar("T")
Path = tuple[int, ...]
Name = tuple[int, int]  # (generation, number) of a slot
Key = tuple[bytes, int, bytes]  # prefix, group, hash

SLABS = 6
LIMITS = Limits(
    lease_ms=400,
    silent_after_ms=300,
    reclaim_grace_ms=50,
    leases_per_engine_max=3,
    stock_bytes_max=40 * KIB,
    reserved_bytes_max=72 * KIB,
)
ENGINES = st.sampled_from(["a", "a", "b", "c", "c", "d"])
ALL_PATHS = [path for length in range(1, 5) for path in product((0, 1), repeat=length)]
PATHS = st.sampled_from(ALL_PATHS)
SELDOM = st.sampled_from([False] * 3 + [True])
PICKS = st.lists(st.integers(0, 19), min_size=1, max_size=4)  # from 16 on: what is not the sender's
REQUESTS = st.sampled_from(["r0", "r1", "r2", "r3"])
PASSED_MS = st.sampled_from([0, 10, 49, 60, 301, 400])

# What a run of the default size meets dozens of times: a machine that misses one explores no longer.
EXPLORED = (
    "stored", "exists", "orphan", "foreign", "hit", "miss", "lease expired", "lease released", "evicted",
    "slab taken", "silent", "engine gone", "slots reclaimed", "restored", "killed", "killed in reserve",
    "killed in commit", "cleared", "aborted", Code.BUSY, Code.NO_SPACE, Code.INCOMPLETE, Code.UNKNOWN_SESSION,
)  # fmt: skip


class ServerKilledError(Exception):
    """The server's process ended at this very write."""


class MortalArena(Arena):
    """Dies when its fuse has burnt down, with only the first bytes of an entry written."""

    fuse = -1  # writes to come before the last; negative: none is the last
    written = 0  # bytes of the last

    def _write(self, number: int, *args: object, **kwargs: object) -> None:
        at = self.geometry.entry_at(number)
        before = bytes(self._table[at : at + ENTRY_BYTES])
        super()._write(number, *args, **kwargs)
        if self.fuse == 0:
            self._table[at + self.written : at + ENTRY_BYTES] = before[self.written :]
            raise ServerKilledError
        self.fuse -= self.fuse > 0


class MortalWorld(World):
    arena_class = MortalArena


@dataclass
class Slot:
    ref: SlotRef
    size: int
    named: bool = True  # its engine knows that it has it


@dataclass
class Stored:
    ref: SlotRef
    size: int
    content: bytes
    parent: Key | None


@dataclass
class Lease:
    expires_ms: int
    chunks: dict[Key, SlotRef]  # all that was promised
    held: list[Key]  # where the promise is anchored


@dataclass
class Known:
    """A member as the service should see it."""

    proof: str
    session: int
    heard_ms: int
    alive: bool = True


@dataclass
class Actor:
    """An engine as it sees itself and as the service should."""

    peer: Peer
    reserved: dict[Name, Slot] = field(default_factory=dict)
    members: dict[int, Known] = field(default_factory=dict)
    died_ms: int = 0

    @property
    def complete(self) -> bool:
        return len([known for known in self.members.values() if known.alive]) == self.peer.ranks

    @property
    def living(self) -> bool:
        return any(proof in self.peer.world.locked for proof in self.peer.proofs.values())

    @property
    def sizes(self) -> list[int]:
        return [self.peer.slot_bytes(group) for group in range(len(self.peer.groups))]

    def key(self, group: int, hash_: bytes) -> Key:
        return self.peer.prefix, group, hash_


def name_of(ref: SlotRef) -> Name:
    return ref.generation, ref.number


def hashes_to(path: Path) -> list[bytes]:
    """Equal beginnings have equal hashes, as the engine's chained ones."""
    return [chain(1, str(path[:length]))[0] for length in range(1, len(path) + 1)]


PATH_OF = {hashes_to(path)[-1]: path for path in ALL_PATHS}


class StorageMachine(RuleBasedStateMachine):
    seen: Counter[str]

    @initialize()
    def begin(self) -> None:
        self.world = MortalWorld(SLABS * SLAB_BYTES, limits=LIMITS)
        specs: dict[str, tuple[bytes, int, tuple[m.Group, ...]]] = {
            "a": (b"shared", 1, (m.Group(4 * KIB),)),
            "b": (b"shared", 1, (m.Group(4 * KIB),)),
            "c": (b"mixed", 1, (m.Group(8 * KIB), m.Group(100, window=2))),
            "d": (b"three ranks", 3, (m.Group(4 * KIB - 1),)),
        }
        self.actors = {
            name: Actor(Peer(self.world, name, groups, namespace, ranks))
            for name, (namespace, ranks, groups) in specs.items()
        }
        self.stored: dict[Key, Stored] = {}
        self.leases: dict[tuple[str, str], Lease] = {}
        self.dead_since_ms: dict[str, int] = {}
        self.cleared: set[Name] = set()
        self.promises: list[tuple[SlotRef, bytes, bytes]] = []
        self.last_generation = 0
        self.contents = count(1)
        self.absent = False
        for name in self.actors:
            self.start(name)

    def note(self, what: str, times: int = 1) -> None:
        if times:
            self.seen[what] += times
            event(what)

    # --- processes

    @rule(name=ENGINES)
    def start(self, name: str) -> None:
        """Every rank that is dead gets a new process; all register, again or for the first time."""
        actor = self.actors[name]
        peer = actor.peer
        for rank in range(peer.ranks):
            if peer.proofs.get(rank) not in self.world.locked:
                peer.spawn(rank)
            session = peer.register(rank).session
            known = actor.members.get(rank)
            if known is not None and known.proof == peer.proofs[rank]:
                assert session == known.session
                known.heard_ms = self.world.now_ms
            else:
                actor.members[rank] = Known(peer.proofs[rank], session, self.world.now_ms)

    @rule(name=ENGINES, rank=st.integers(0, 2), orderly=SELDOM)
    def end(self, name: str, rank: int, orderly: bool) -> None:
        actor = self.actors[name]
        if orderly:
            self.leave(actor)
        elif actor.living:
            actor.peer.kill(rank % actor.peer.ranks)
        if not actor.living:
            actor.died_ms = self.world.now_ms
            for slot in actor.reserved.values():
                slot.named = False  # a successor has never heard of it

    def leave(self, actor: Actor) -> None:
        """All ranks, one after the other, if all that live are registered."""
        peer = actor.peer
        if {known.proof for known in actor.members.values()} != set(peer.proofs.values()) & self.world.locked:
            return
        for rank in list(actor.members):
            left = self.run(lambda rank=rank: peer.unregister(rank), "leave")
            peer.kill(rank)
            if left is None:
                return
            del actor.members[rank]
        self.forget_leases(actor)

    def forget_leases(self, actor: Actor) -> None:
        for lease in [lease for lease in self.leases if lease[0] == actor.peer.name]:
            del self.leases[lease]

    def heard(self, actor: Actor) -> None:
        if 0 in actor.members:
            actor.members[0].heard_ms = self.world.now_ms

    # --- the server's death

    @rule(fuse=st.integers(-1, 12), written=st.sampled_from([0, 1, 24, 60, 127, 128]), absent=SELDOM)
    def crash(self, fuse: int, written: int, absent: bool) -> None:
        """Now, or so many writes later."""
        arena = self.world.arena
        assert isinstance(arena, MortalArena)
        arena.fuse, arena.written, self.absent = fuse, written, absent
        if fuse < 0:
            self.start_server()
            self.return_sessions()
            self.note("restored", len(self.stored))

    def start_server(self) -> None:
        self.world.start()
        self.leases.clear()
        self.dead_since_ms.clear()
        for actor in self.actors.values():
            actor.members.clear()

    def return_sessions(self) -> None:
        """Who lives notices the new server and registers, unless nobody has noticed yet."""
        if not self.absent:
            for name, actor in self.actors.items():
                if actor.living:
                    self.start(name)

    def run(
        self,
        act: Callable[[], T],
        doing: str,
        *,
        losing: Callable[[], set[Key]] = set,
        storing: Sequence[tuple[Key, Slot, Key | None]] = (),
        ending: Sequence[Actor] = (),
        reserving: Actor | None = None,
        aborting: Sequence[Name] = (),
    ) -> T | str | None:
        """-> its answer, a refusal's code, or None after the server was killed: some of what it was asked has
        then been done, and nothing else."""
        before, may_lose = self.picture(), losing()
        try:
            return act()
        except RefusedError as refusal:
            assert self.picture() == before, "a refusal changes nothing"
            self.note(refusal.code)
            return refusal.code
        except ServerKilledError:
            self.start_server()
            self.note("killed")
            self.note(f"killed in {doing}")
        lost, committed, reserved = self.compare()
        assert lost <= may_lose
        for key in lost:
            del self.stored[key]
        for key, slot, parent in storing:
            if name_of(slot.ref) in committed:
                self.admit(key, slot, parent)
        may_end = {*aborting, *(name_of(slot.ref) for _, slot, _ in storing)}
        for actor in self.actors.values():
            for name in set(actor.reserved) - reserved.keys():
                assert name in may_end or actor in ending
                del actor.reserved[name]
        self.adopt_unheard(reserving, reserved)
        self.return_sessions()
        return None

    def adopt_unheard(self, reserving: Actor | None, reserved: dict[Name, Slot]) -> None:
        ours = {name for actor in self.actors.values() for name in actor.reserved}
        for name in reserved.keys() - ours:
            assert reserving is not None, "nobody asked for it"
            reserving.reserved[name] = reserved[name]
            reserved[name].named = False
            self.last_generation = max(self.last_generation, name[0])

    # --- storing

    @rule(name=ENGINES, group=st.integers(0, 1), wanted=st.integers(1, 6))
    def reserve(self, name: str, group: int, wanted: int) -> None:
        actor = self.actors[name]
        self.reserve_slots(actor, min(group, len(actor.peer.groups) - 1), wanted)

    def reserve_slots(self, actor: Actor, group: int, wanted: int) -> list[SlotRef]:
        size = actor.sizes[group]
        refused = self.refused_by_limits(actor, size * wanted, sum(actor.sizes) * wanted)
        available, others = self.available(size), self.slabs()
        self.heard(actor)
        slots = self.run(
            lambda: actor.peer.reserve(wanted, group), "reserve",
            losing=lambda: self.stored.keys() - self.protected(), reserving=actor,
        )  # fmt: skip
        if slots is None:
            return []
        if not isinstance(slots, list):
            leaving = sum(self.stored[key].size == size for key in self.stored.keys() - self.protected())
            assert slots == refused or (
                not refused and slots == Code.NO_SPACE and available + leaving < wanted
            )
            return []
        assert not refused
        assert len(slots) == wanted
        self.check_room(size, wanted - available, others)
        for slot in slots:
            assert slot.generation > self.last_generation, "a generation is given out once"
            self.last_generation = slot.generation
            actor.reserved[name_of(slot)] = Slot(slot, size)
        return slots

    def refused_by_limits(self, actor: Actor, wanted_bytes: int, chunks_bytes: int = 0) -> str:
        mine = sum(slot.size for slot in actor.reserved.values())
        everybodys = sum(slot.size for each in self.actors.values() for slot in each.reserved.values())
        if 0 not in actor.members:
            return Code.UNKNOWN_SESSION
        if not actor.complete:
            return Code.INCOMPLETE
        if chunks_bytes > LIMITS.stock_bytes_max:
            return Code.TOO_LARGE
        if (
            mine + wanted_bytes > LIMITS.stock_bytes_max
            or everybodys + wanted_bytes > LIMITS.reserved_bytes_max
        ):
            return Code.BUSY
        return ""

    def check_room(self, size: int, missing: int, slabs_before: Counter[int]) -> None:
        """Who had to make room, and whether that was fair."""
        lost = self.compare()[0]
        assert not lost or missing > 0, "there was room"
        assert not lost & self.protected(), "leased"
        slabs = self.slabs()
        share = SLABS // len({size, *self.sizes_in_use()})
        for other in set(self.sizes_in_use()) - {size}:
            if any(self.stored[key].size == other for key in lost):
                assert slabs[other] >= share, "others keep their share"
        own = sum(self.stored[key].size == size for key in lost)
        gained = slabs[size] - slabs_before[size] - slabs_before[1] + slabs[1]  # 1: without a size
        assert own <= max(0, missing - gained * (SLAB_BYTES // size)), "no more than needed"
        self.note("evicted", own)
        self.note("slab taken", len(lost) > own)
        for key in lost:
            del self.stored[key]

    @rule(name=ENGINES)
    def write(self, name: str) -> None:
        """A process that lives, be it silent, may write into what it has reserved; and a device that it has
        started may go on for a moment after its death."""
        actor = self.actors[name]
        if actor.living or self.world.now_ms - actor.died_ms < LIMITS.reclaim_grace_ms:
            for slot in actor.reserved.values():
                content = b"%016d" % next(self.contents)
                self.world.file[slot.ref.offset :][: slot.size] = content * (slot.size // len(content))

    @rule(name=ENGINES, group=st.integers(0, 1), path=PATHS, first=st.integers(0, 3), picks=PICKS)
    def commit(self, name: str, group: int, path: Path, first: int, picks: list[int]) -> None:
        """Any chunks of a prefix in any slots, own or not."""
        actor = self.actors[name]
        group = min(group, len(actor.peer.groups) - 1)
        first %= len(path)
        slots = self.pick(actor, picks)[: len(path) - first]
        self.commit_chunks(actor, group, hashes_to(path), first, slots)

    def store(self, actor: Actor, path: Path, whole: bool) -> None:
        """A prompt in all groups, or what is missing of it; as an engine does it."""
        hashes = hashes_to(path)
        for group in range(len(actor.peer.groups)):
            missing = [at for at, hash_ in enumerate(hashes) if actor.key(group, hash_) not in self.stored]
            first = 0 if whole else min(missing, default=len(path))
            if first < len(path) and (slots := self.reserve_slots(actor, group, len(path) - first)):
                self.write(actor.peer.name)
                self.commit_chunks(actor, group, hashes, first, slots)

    def pick(self, actor: Actor, picks: Sequence[int]) -> list[SlotRef]:
        own = [slot.ref for slot in actor.reserved.values() if slot.named]
        others = [
            slot.ref for each in self.actors.values() if each is not actor for slot in each.reserved.values()
        ]
        others += [chunk.ref for chunk in self.stored.values()]
        others += [ref._replace(generation=ref.generation - 1) for ref in own]
        pools = [(own or others) if pick < 16 else (others or own) for pick in picks]
        return [pool[pick % len(pool)] for pool, pick in zip(pools, picks, strict=True) if pool]

    def commit_chunks(
        self, actor: Actor, group: int, hashes: Sequence[bytes], first: int, slots: Sequence[SlotRef]
    ) -> None:
        parent = hashes[first - 1] if first else b""
        hashes = hashes[first : first + len(slots)]
        self.heard(actor)
        expected, storing = self.expect(actor, group, parent, list(zip(hashes, slots, strict=True)))
        named = [name_of(slot) for slot in slots]
        outcomes = self.run(
            lambda: actor.peer.commit(hashes, slots, parent, group), "commit",
            storing=storing, aborting=named,
        )  # fmt: skip
        if isinstance(outcomes, str):
            assert outcomes == self.refused_by_limits(actor, 0)
        elif outcomes is not None:
            assert list(outcomes) == expected
            for name, outcome in zip(named, outcomes, strict=True):
                self.note(("stored", "exists", "orphan", "foreign")[outcome])
                if outcome in (Outcome.EXISTS, Outcome.ORPHAN):
                    del actor.reserved[name]
            for key, slot, its_parent in storing:
                self.admit(key, slot, its_parent)

    def expect(
        self, actor: Actor, group: int, parent: bytes, chunks: Sequence[tuple[bytes, SlotRef]]
    ) -> tuple[list[int], list[tuple[Key, Slot, Key | None]]]:
        outcomes: list[int] = []
        storing: dict[Key, tuple[Key, Slot, Key | None]] = {}
        used: set[Name] = set()
        for hash_, ref in chunks:
            key, parent_key = actor.key(group, hash_), actor.key(group, parent)
            slot = actor.reserved.get(name_of(ref))
            window = actor.peer.groups[group].window
            if slot is None or name_of(ref) in used or slot.size != actor.sizes[group]:
                outcomes.append(Outcome.FOREIGN)
            else:
                used.add(name_of(ref))
                if key in self.stored or key in storing:
                    outcomes.append(Outcome.EXISTS)
                elif parent and not window and parent_key not in self.stored and parent_key not in storing:
                    outcomes.append(Outcome.ORPHAN)
                else:
                    outcomes.append(Outcome.STORED)
                    storing[key] = (key, slot, None if window or not parent else parent_key)
            parent = hash_
        return outcomes, list(storing.values())

    def admit(self, key: Key, slot: Slot, parent: Key | None) -> None:
        self.stored[key] = Stored(slot.ref, slot.size, self.content(slot.ref, slot.size), parent)
        for actor in self.actors.values():
            actor.reserved.pop(name_of(slot.ref), None)

    @rule(name=ENGINES, picks=PICKS, all_but=SELDOM)
    def abort(self, name: str, picks: list[int], all_but: bool) -> None:
        actor = self.actors[name]
        slots = self.pick(actor, picks)
        named = {name_of(slot) for slot in slots}
        mine = actor.reserved.keys() - named if all_but else actor.reserved.keys() & named
        if all_but and self.world.now_ms - actor.died_ms < LIMITS.reclaim_grace_ms:
            return  # its predecessor's device may still write
        self.heard(actor)
        aborted = self.run(lambda: actor.peer.abort(slots, all_but=all_but), "abort", aborting=list(mine))
        if isinstance(aborted, str):
            assert (aborted, 0 in actor.members) == (Code.UNKNOWN_SESSION, False)
        elif aborted is not None:
            assert aborted == len(mine)
            self.note("aborted", len(mine))
            for each in mine:
                del actor.reserved[each]

    @rule(name=ENGINES, really=SELDOM, everything=st.booleans())
    def clear(self, name: str, really: bool, everything: bool) -> None:
        actor = self.actors[name]
        if not really or not (everything or actor.complete):
            return
        going = {key for key in self.stored if everything or key[0] == actor.peer.prefix}
        self.cleared |= {name_of(self.stored[key].ref) for key in going}
        cleared = self.run(lambda: actor.peer.clear(TOKEN * everything), "clear", losing=lambda: going)
        if cleared is not None:
            assert cleared == len(going)
            self.note("cleared", len(going))
            for key in going:
                del self.stored[key]

    # --- finding

    @rule(name=ENGINES, pick=st.integers(0, 60), request=REQUESTS)
    def lookup(self, name: str, pick: int, request: str) -> None:
        """Of what is stored, or of anything."""
        stored = [
            PATH_OF[hash_] for prefix, _, hash_ in self.stored if prefix == self.actors[name].peer.prefix
        ]
        paths = [*stored, *ALL_PATHS]
        self.look_up(self.actors[name], paths[pick % len(paths)], request)

    def look_up(self, actor: Actor, path: Path, request: str) -> None:
        name = actor.peer.name
        hashes = hashes_to(path)
        self.heard(actor)
        found = self.run(lambda: actor.peer.lookup(hashes, request), "lookup")
        length = self.longest_prefix(actor, hashes)
        leases = [lease for lease in self.leases if lease[0] == name]
        if not isinstance(found, m.Found):
            full = length > 0 and len(leases) == LIMITS.leases_per_engine_max
            assert found == (self.refused_by_limits(actor, 0) or (full and Code.BUSY))
            return
        assert found.chunks == length
        self.note("hit" if length else "miss")
        self.leases.pop((name, request), None)
        if length:
            assert len(leases) < LIMITS.leases_per_engine_max or (name, request) in leases
            self.leases[name, request] = self.promised(actor, hashes, found)

    @rule(name=ENGINES, path=PATHS, request=REQUESTS, whole=SELDOM, ends=st.booleans())
    def serve(self, name: str, path: Path, request: str, whole: bool, ends: bool) -> None:
        """One request's whole way."""
        actor = self.actors[name]
        if not actor.complete:
            self.start(name)
        self.look_up(actor, path, request)
        self.store(actor, path, whole)
        if ends:
            self.release(name, [request])

    def longest_prefix(self, actor: Actor, hashes: Sequence[bytes]) -> int:
        def complete(length: int) -> bool:
            return all(
                actor.key(group, hash_) in self.stored
                for group, shape in enumerate(actor.peer.groups)
                for hash_ in hashes[max(0, length - shape.window) if shape.window else 0 : length]
            )

        return max(filter(complete, range(len(hashes) + 1)))

    def promised(self, actor: Actor, hashes: Sequence[bytes], found: m.Found) -> Lease:
        lease = Lease(self.world.now_ms + LIMITS.lease_ms, {}, [])
        for group, part in enumerate(found.groups):
            keys = [actor.key(group, hash_) for hash_ in hashes[part.first : found.chunks]]
            refs = split_slot_refs(part.slots)
            window = actor.peer.groups[group].window
            assert part.first == (max(0, found.chunks - window) if window else 0)
            lease.chunks |= dict(zip(keys, refs, strict=True))
            lease.held += keys if window else keys[-1:]
            for key, ref in zip(keys, refs, strict=True):
                assert ref == self.stored[key].ref
                self.promises.append((ref, key[2], self.stored[key].content))
        return lease

    @rule(name=ENGINES, requests=st.lists(REQUESTS, max_size=3))
    def release(self, name: str, requests: list[str]) -> None:
        actor = self.actors[name]
        mine = {(name, request) for request in requests} & self.leases.keys()
        self.heard(actor)
        released = self.run(lambda: actor.peer.release(*requests), "release")
        assert released == (len(mine) if 0 in actor.members else Code.UNKNOWN_SESSION)
        if 0 in actor.members:
            self.note("lease released", len(mine))
            for lease in mine:
                del self.leases[lease]

    def protected(self) -> set[Key]:
        """What is leased; a chunk that was cleared and stored again is another one."""
        promised = [chunk for lease in self.leases.values() for chunk in lease.chunks.items()]
        return {key for key, ref in promised if key in self.stored and self.stored[key].ref == ref}

    # --- time

    @rule(passed_ms=PASSED_MS, pinging=st.sets(ENGINES))
    def pass_time(self, passed_ms: int, pinging: set[str]) -> None:
        now_ms = self.world.now_ms + passed_ms
        owners = [name for name, actor in self.actors.items() if actor.members or actor.reserved]
        dead = [name for name in owners if not self.actors[name].living]
        since_ms = {name: self.dead_since_ms.get(name, now_ms) for name in dead}
        gone = [name for name in dead if now_ms - since_ms[name] >= LIMITS.reclaim_grace_ms]
        found = self.run(
            lambda: self.world.pass_ms(passed_ms), "tick", ending=[self.actors[name] for name in gone]
        )
        if found is None:
            return
        self.dead_since_ms = since_ms
        expired = [name for name, lease in self.leases.items() if lease.expires_ms <= now_ms]
        self.note("lease expired", len(expired))
        for lease in expired:
            del self.leases[lease]
        for actor in self.actors.values():
            for known in actor.members.values():
                known.alive = known.alive and known.proof in self.world.locked
        assert len(found) == len(gone)
        for name in gone:
            self.note("engine gone")
            self.note("slots reclaimed", len(self.actors[name].reserved))
            self.actors[name].reserved.clear()
            self.actors[name].members.clear()
            self.forget_leases(self.actors[name])
        for name in sorted(pinging):
            actor = self.actors[name]
            assert actor.peer.ping(0).known == (0 in actor.members)
            self.heard(actor)

    # --- what the file says

    def picture(self) -> object:
        index, leases = self.world.service.storage.index, self.world.service.leases
        chunks = {c.slot: (c.hash, c.leases, c.stamp) for s in index.spaces for c in s.chunks.values()}
        table = bytes(self.world.file[SLABS_AT : self.world.geometry.entry_at(SLABS * SLAB_BYTES // 4096)])
        return table, chunks, len(leases), len(self.world.service.registry)

    def entries(self) -> Iterator[tuple[int, Name, Slot, bytes]]:
        """State, name, slot and owner of every slot in use."""
        geometry = self.world.geometry
        for slab in range(SLABS):
            size = read_slab(self.world.file, geometry, slab)
            for number in range(slab * 4, slab * 4 + SLAB_BYTES // size if size > 1 else 0):
                entry = read_entry(self.world.file, geometry, number)
                if entry is not None and entry.state != SlotState.FREE:
                    ref = SlotRef(entry.offset, entry.generation, number)
                    yield entry.state, name_of(ref), Slot(ref, size), entry.owner

    def compare(self) -> tuple[set[Key], dict[Name, Slot], dict[Name, Slot]]:
        """-> what is no longer stored, what is committed, what is reserved"""
        committed = {name: slot for state, name, slot, _ in self.entries() if state == SlotState.COMMITTED}
        reserved = {name: slot for state, name, slot, _ in self.entries() if state == SlotState.RESERVED}
        lost = {key for key, chunk in self.stored.items() if name_of(chunk.ref) not in committed}
        return lost, committed, reserved

    def content(self, ref: SlotRef, size: int) -> bytes:
        return bytes(self.world.file[ref.offset : ref.offset + size])

    def slabs(self) -> Counter[int]:
        """How many of each slot size; 1: without one."""
        return Counter(read_slab(self.world.file, self.world.geometry, slab) for slab in range(SLABS))

    def available(self, size: int) -> int:
        used = sum(slot.size == size for _, _, slot, _ in self.entries())
        return (self.slabs()[size] + self.slabs()[1]) * (SLAB_BYTES // size) - used

    def sizes_in_use(self) -> list[int]:
        return [size for actor in self.actors.values() if actor.complete for size in actor.sizes]

    # --- what always holds

    @invariant()
    def sound(self) -> None:
        self.the_table_says_what_the_model_says()
        self.no_byte_has_two_owners()
        self.every_byte_is_counted_once()
        self.what_is_stored_is_what_was_written()
        self.the_index_knows_what_is_stored_and_no_orphans()
        self.leases_hold_what_they_promised()
        self.a_reader_with_an_old_promise_sees_its_bytes_or_that_they_are_gone()
        self.exactly_what_may_leave_is_in_a_pool()

    def the_table_says_what_the_model_says(self) -> None:
        lost, committed, reserved = self.compare()
        assert not lost
        assert committed.keys() == {name_of(chunk.ref) for chunk in self.stored.values()}
        owners = {name: owner for state, name, _, owner in self.entries() if state == SlotState.RESERVED}
        assert owners == {name: a.peer.owner for a in self.actors.values() for name in a.reserved}
        assert {name: slot.ref for name, slot in reserved.items()} == {
            name: slot.ref for actor in self.actors.values() for name, slot in actor.reserved.items()
        }

    def no_byte_has_two_owners(self) -> None:
        regions = sorted((slot.ref.offset, slot.ref.offset + slot.size) for _, _, slot, _ in self.entries())
        assert all(end <= begin for (_, end), (begin, _) in pairwise(regions))
        assert all(begin >= self.world.geometry.data_at for begin, _ in regions)
        assert all(end <= self.world.geometry.file_bytes for _, end in regions)

    def every_byte_is_counted_once(self) -> None:
        arena = report.describe(self.world.service, self.world.now_ms, 0, 0, "").arena
        assert arena.free_bytes + arena.used_bytes + arena.quarantined_bytes == arena.capacity_bytes
        assert arena.committed_bytes == sum(chunk.size for chunk in self.stored.values())
        quiet = [actor for actor in self.actors.values() if not self.audible(actor)]
        self.note("silent", len([actor for actor in quiet if actor.members and actor.living]))
        assert arena.quarantined_bytes == sum(
            slot.size for actor in quiet for slot in actor.reserved.values()
        )
        assert arena.stocked_bytes + arena.quarantined_bytes == sum(
            slot.size for actor in self.actors.values() for slot in actor.reserved.values()
        )

    def audible(self, actor: Actor) -> bool:
        silent_since_ms = self.world.now_ms - LIMITS.silent_after_ms
        return bool(actor.members) and all(
            known.alive and known.heard_ms >= silent_since_ms for known in actor.members.values()
        )

    def what_is_stored_is_what_was_written(self) -> None:
        for (_, _, hash_), chunk in self.stored.items():
            assert holds(self.world.file, self.world.geometry, chunk.ref, hash_)
            assert self.content(chunk.ref, chunk.size) == chunk.content

    def the_index_knows_what_is_stored_and_no_orphans(self) -> None:
        index = self.world.service.storage.index
        chunks = {(s.prefix, s.group, c.hash): c.slot for s in index.spaces for c in s.chunks.values()}
        assert chunks == {key: chunk.ref for key, chunk in self.stored.items()}
        assert len(index) == len(chunks)
        assert all(c.parent is None or c.parent in self.stored for c in self.stored.values())
        for chunk in self.chunks():
            assert (chunk.parent is None) == (self.stored[self.key_of(chunk)].parent is None)
            assert chunk.parent is None or self.key_of(chunk.parent) == self.stored[self.key_of(chunk)].parent
            assert chunk.parent is None or chunk in (chunk.parent.children or ())
            assert chunk.depth == (chunk.parent.depth + 1 if chunk.parent else 1)
            assert all(child.parent is chunk and child.stored for child in chunk.children or ())

    def chunks(self) -> list[Chunk]:
        return [c for space in self.world.service.storage.index.spaces for c in space.chunks.values()]

    def key_of(self, chunk: Chunk) -> Key:
        return chunk.space.prefix, chunk.space.group, chunk.hash

    def leases_hold_what_they_promised(self) -> None:
        leases = self.world.service.leases
        assert {name: lease.expires_ms for name, lease in leases._leases.items()} == {
            name: lease.expires_ms for name, lease in self.leases.items()
        }
        for name in self.actors:
            assert leases.of(name) == sum(lease[0] == name for lease in self.leases)
        stored = {name_of(chunk.ref) for chunk in self.stored.values()}
        held: Counter[Name] = Counter()
        for lease in self.leases.values():
            assert {name_of(ref) for ref in lease.chunks.values()} <= stored | self.cleared
            held.update(name_of(lease.chunks[key]) for key in lease.held)
        for chunk in self.chunks():
            assert chunk.leases == held[name_of(chunk.slot)]

    def a_reader_with_an_old_promise_sees_its_bytes_or_that_they_are_gone(self) -> None:
        for ref, hash_, content in self.promises[-100:]:
            if holds(self.world.file, self.world.geometry, ref, hash_):
                assert self.content(ref, len(content)) == content

    def exactly_what_may_leave_is_in_a_pool(self) -> None:
        index = self.world.service.storage.index
        leaves = [chunk for chunk in self.chunks() if not chunk.children and not chunk.leases]
        assert all(not chunk.ticket for chunk in self.chunks() if chunk not in leaves)
        assert {chunk.space.slot_bytes for chunk in leaves} <= index._pools.keys()
        for size, pool in index._pools.items():
            mine = {chunk.ticket: chunk for chunk in leaves if chunk.space.slot_bytes == size}
            valid = {ticket: (rank, chunk) for rank, ticket, chunk in pool._heap if chunk.ticket == ticket}
            assert valid == {ticket: (chunk.stamp, chunk) for ticket, chunk in mine.items()}
            assert len(pool) == len(mine)


@pytest.mark.timeout(900)  # a failure is shrunk for minutes
def test_the_service_behaves_as_its_model() -> None:
    seen: Counter[str] = Counter()

    class Machine(StorageMachine):
        pass

    Machine.seen = seen
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=600, stateful_step_count=60, deadline=None, derandomize=False, print_blob=True
        ),
    )
    assert [what for what in EXPLORED if not seen[what]] == []
