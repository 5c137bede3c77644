"""Which chunks are stored: hash -> slot, as a forest of prefixes.

Rule 1: a chunk is stored only under a stored parent, and leaves only after its children.  So a chain of
hashes is present up to some chunk and absent behind it: the longest prefix is found by bisection, and a
lease on its last chunk holds all of it.
Rule 2: chunks of a sliding-window group stand alone; only the last `window` chunks of a prefix are needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from cache_server.eviction import Policy, Pool
from cache_server.protocol.keys import SLOT_REF, SlotRef


class Chunk:
    __slots__ = ("children", "depth", "hash", "hits", "leases", "parent", "ref", "space", "stamp", "ticket")

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


class Admission(IntEnum):
    EXISTS = 1
    ORPHAN = 2


class Index:
    def __init__(self, new_policy: Callable[[], Policy]) -> None:
        self._new_policy = new_policy
        self._pools: dict[int, Pool[Chunk]] = {}  # by slot size: only an equal slot makes room
        self._spaces: dict[tuple[bytes, int], Space] = {}
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

    def use(self, space: Space, hashes: Sequence[bytes], length: int) -> list[Chunk]:
        """The chunks that a load of `length` chunks needs of this group, in order; marks them as used."""
        self._clock += 1
        clock = self._clock
        chunks: list[Chunk] = []
        if space.window:
            for hash_ in hashes[max(0, length - space.window) : length]:
                chunk = space.chunks[hash_]
                chunk.stamp = clock
                chunk.hits += 1
                chunks.append(chunk)
            return chunks
        link: Chunk | None = space.chunks[hashes[length - 1]]
        while link is not None:
            link.stamp = clock
            link.hits += 1
            chunks.append(link)
            link = link.parent
        chunks.reverse()
        return chunks

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

    def evict(self, slot_bytes: int, count: int) -> list[Chunk] | None:
        """The `count` chunks that leave first; None, and nothing has changed, if so many can't."""
        pool = self._pools.get(slot_bytes)
        if pool is None:
            return None
        leaving: list[Chunk] = []
        while len(leaving) < count:
            chunk = pool.pop()
            if chunk is None:
                for taken in reversed(leaving):
                    self._link(taken)
                return None
            self._unlink(chunk)
            leaving.append(chunk)
        for chunk in leaving:
            pool.policy.evicted(chunk)
        return leaving

    def family(self, roots: Sequence[Chunk]) -> list[Chunk]:
        """These chunks and all their descendants, children first."""
        order: dict[Chunk, None] = {}
        waiting = list(roots)
        while waiting:
            chunk = waiting.pop()
            if chunk not in order:
                order[chunk] = None
                waiting.extend(chunk.children or ())
        return sorted(order, key=lambda chunk: -chunk.depth)

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
        self._size -= 1
        if not space.chunks:
            del self._spaces[space.prefix, space.group]
        if parent is not None:
            assert parent.children is not None, "a child is its parent's"
            del parent.children[chunk]
            if not parent.children:
                parent.children = None
                self._offer(parent)

    def _offer(self, chunk: Chunk) -> None:
        """Into the pool, if it may leave now."""
        if chunk.children is None and not chunk.leases and chunk.stored:
            self._pool(chunk).add(chunk)


def _chain_length(space: Space, hashes: Sequence[bytes], length: int) -> int:
    present, absent = 0, length + 1
    while absent - present > 1:
        middle = (present + absent) // 2
        chunk = space.chunks.get(hashes[middle - 1])
        if chunk is not None and chunk.depth == middle:
            present = middle
        else:
            absent = middle
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
