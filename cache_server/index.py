"""Which chunks are stored: hash -> slot, as a forest of prefixes.

Rule 1: a chunk is stored only under a stored parent, and leaves only after its children.  So a chain of
hashes is present up to some chunk and absent behind it: the longest prefix is found by bisection, and a
lease on its last chunk holds all of it.
Rule 2: chunks of a sliding-window group stand alone; only the last `window` chunks of a prefix are needed.
Rule 3: a use of a chunk is one of all before it.  It is noted where the found prefix ended, and handed on to
the parent when that chunk leaves: only then has anybody to know it of the parent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import islice
from operator import attrgetter
from typing import NamedTuple

from cache_server.eviction import Policy, Pool
from cache_server.protocol.keys import SLOT_REF, SlotRef
from cache_server.trails import Trails

_ref_of = attrgetter("ref")


class Chunk:
    __slots__ = (
        "children", "depth", "hash", "hits", "leases", "parent", "ref", "space", "stamp", "ticket", "trail",
    )  # fmt: skip

    def __init__(self, space: "Space", hash: bytes, parent: "Chunk | None", slot: SlotRef) -> None:  # noqa: A002
        self.space = space
        self.hash = hash
        self.parent = parent
        self.ref = SLOT_REF.pack(*slot)  # as LOOKUP answers it
        self.depth: int = parent.depth + 1 if parent else 1
        self.children: dict[Chunk, None] | None = None  # ordered, for the same outcome in every run
        self.leases = 0
        self.hits = 0
        self.stamp = 0
        self.ticket = 0
        self.trail = b""  # `Trails` keeps it

    @property
    def slot(self) -> SlotRef:
        return SlotRef(*SLOT_REF.unpack(self.ref))

    @property
    def stored(self) -> bool:
        return self.space.chunks.get(self.hash) is self


@dataclass(eq=False, slots=True)
class Space:
    """The chunks of one namespace and one KV cache group; `window` 0: prefixes are chained."""

    prefix: bytes
    group: int
    slot_bytes: int
    window: int
    chunks: dict[bytes, Chunk] = field(default_factory=dict)


class Used(NamedTuple):
    ends: list[Chunk]  # a lease on these holds all that was found
    refs: bytes  # the slots, in order

    @property
    def length(self) -> int:
        return len(self.refs) // SLOT_REF.size


class Admission(IntEnum):
    EXISTS = 1
    ORPHAN = 2


class Index:
    def __init__(self, new_policy: Callable[[], Policy]) -> None:
        self._new_policy = new_policy
        self._pools: dict[int, Pool[Chunk]] = {}  # by slot size: only an equal slot makes room
        self._spaces: dict[tuple[bytes, int], Space] = {}
        self._trails: Trails[Chunk] = Trails()
        self._clock = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @property
    def spaces(self) -> list[Space]:
        return list(self._spaces.values())

    def space(self, prefix: bytes, group: int, slot_bytes: int, window: int) -> Space:
        space = self._spaces.get((prefix, group)) or Space(prefix, group, slot_bytes, window)
        assert (space.slot_bytes, space.window) == (slot_bytes, window), "the prefix covers both"
        return space

    def find(self, prefix: bytes, group: int, hash_: bytes) -> Chunk | None:
        space = self._spaces.get((prefix, group))
        return space.chunks.get(hash_) if space is not None else None

    def longest_prefix(self, spaces: Sequence[Space], hashes: Sequence[bytes]) -> int:
        """How many of `hashes`, from the first on, every group can supply."""
        length = len(hashes)
        for space in spaces:
            if not space.window:
                length = _chain_length(space, hashes, length)
        while length:
            shorter = length
            for space in spaces:
                if space.window:
                    shorter = _window_end(space, hashes, shorter)
            if shorter == length:
                break
            length = shorter
        return length

    def use(self, space: Space, hashes: Sequence[bytes], length: int) -> Used:
        """What a load of `length` chunks needs of this group; marks it as used."""
        self._clock += 1
        first = max(0, length - space.window) if space.window else length - 1
        ends = [space.chunks[hash_] for hash_ in hashes[first:length]]
        for chunk in ends:
            chunk.stamp = self._clock
            chunk.hits += 1
        return Used(ends, b"".join(map(_ref_of, ends)) if space.window else self._trails.to(ends[0]))

    def lease(self, chunk: Chunk) -> None:
        chunk.leases += 1
        self._pool(chunk).discard(chunk)

    def unlease(self, chunk: Chunk) -> None:
        assert chunk.leases > 0, "a lease ends once"
        chunk.leases -= 1
        self._offer(chunk)

    def admit(self, space: Space, hash_: bytes, parent_hash: bytes, slot: SlotRef) -> Chunk | Admission:
        if hash_ in space.chunks:
            return Admission.EXISTS
        parent = None
        if parent_hash and not space.window:
            parent = space.chunks.get(parent_hash)
            if parent is None:
                return Admission.ORPHAN
        return self.adopt(space, hash_, parent, slot, self._clock + 1)

    def adopt(self, space: Space, hash_: bytes, parent: Chunk | None, slot: SlotRef, stamp: int) -> Chunk:
        """Stores a chunk last used at `stamp`."""
        assert hash_ not in space.chunks, "a key is written once"
        self._clock = max(self._clock, stamp)
        chunk = Chunk(space, hash_, parent, slot)
        chunk.stamp = stamp
        self._pool(chunk).policy.admitted(chunk)
        self._link(chunk)
        return chunk

    def evict(
        self, slot_bytes: int, count: int, makes_room: Callable[[Chunk], bool] = lambda _: True
    ) -> list[Chunk] | None:
        """The chunks that leave first, as many as it takes for `count` that make room; None, and nothing has
        changed, if so many can't."""
        pool = self._pools.get(slot_bytes)
        if pool is None:
            return None
        leaving: list[Chunk] = []
        stamps: list[int] = []  # their parents' before
        made = 0
        while made < count:
            chunk = pool.pop()
            if chunk is None:
                self._take_back(leaving, stamps)
                return None
            stamps.append(chunk.parent.stamp if chunk.parent else 0)
            leaving.append(chunk)
            made += makes_room(chunk)
            self._unlink(chunk)
        for chunk in leaving:
            pool.policy.evicted(chunk)
        return leaving

    def _take_back(self, leaving: Sequence[Chunk], stamps: Sequence[int]) -> None:
        for chunk, stamp in zip(reversed(leaving), reversed(stamps), strict=True):
            self._link(chunk)
            if chunk.parent is not None:
                chunk.parent.hits -= chunk.hits
                chunk.parent.stamp = stamp

    def family(self, roots: Sequence[Chunk]) -> list[Chunk]:
        """These chunks and all their descendants, children first."""
        return sorted(self.some_of_family(roots, self._size), key=lambda chunk: -chunk.depth)

    def some_of_family(self, roots: Sequence[Chunk], most: int) -> list[Chunk]:
        """`most` of them at most, in any order."""
        order: dict[Chunk, None] = {}
        waiting = list(roots)
        while waiting and len(order) < most:
            chunk = waiting.pop()
            if chunk not in order:
                order[chunk] = None
                waiting.extend(islice(chunk.children or (), most))
        return list(order)

    def drop(self, family: Sequence[Chunk]) -> None:
        """Takes out what `family` returned, leased or not."""
        for chunk in family:
            self._pool(chunk).discard(chunk)
            self._unlink(chunk)

    def _pool(self, chunk: Chunk) -> Pool[Chunk]:
        pool = self._pools.get(chunk.space.slot_bytes)
        if pool is None:
            pool = self._pools[chunk.space.slot_bytes] = Pool(self._new_policy())
        return pool

    def _link(self, chunk: Chunk) -> None:
        space, parent = chunk.space, chunk.parent
        self._spaces[space.prefix, space.group] = space
        space.chunks[chunk.hash] = chunk
        self._size += 1
        if parent is not None:
            if parent.children is None:
                parent.children = {}
                self._pool(parent).discard(parent)
            parent.children[chunk] = None
        self._offer(chunk)

    def _unlink(self, chunk: Chunk) -> None:
        space, parent = chunk.space, chunk.parent
        assert chunk.children is None, "children leave first"
        del space.chunks[chunk.hash]
        self._trails.drop(chunk)
        self._size -= 1
        if not space.chunks:
            del self._spaces[space.prefix, space.group]
        if parent is not None:
            assert parent.children is not None, "a child is its parent's"
            del parent.children[chunk]
            if chunk.hits:  # else its stamp tells when it was stored
                parent.hits += chunk.hits
                parent.stamp = max(parent.stamp, chunk.stamp)
            if not parent.children:
                parent.children = None
                self._offer(parent)

    def _offer(self, chunk: Chunk) -> None:
        """Into the pool, if it may leave now."""
        if chunk.children is None and not chunk.leases and chunk.stored:
            self._pool(chunk).add(chunk)


def _chain_length(space: Space, hashes: Sequence[bytes], length: int) -> int:
    present, absent = 0, length + 1
    middle = length  # most prompts are there as a whole or not at all
    while absent - present > 1:
        chunk = space.chunks.get(hashes[middle - 1])
        if chunk is not None and chunk.depth == middle:
            present = middle
        else:
            absent = middle
        middle = (present + absent) // 2
    return present


def _window_end(space: Space, hashes: Sequence[bytes], length: int) -> int:
    """The greatest end <= length with the window before it complete."""
    run = 0
    end = length
    for at in range(length - 1, -1, -1):
        if hashes[at] in space.chunks:
            run += 1
            if run == space.window:
                return end
        else:
            run = 0
            end = at
    return end
