"""Which chunk leaves first: a policy ranks chunks, a pool hands out the lowest rank.

A pool holds the chunks that may leave *now*: complete, without a lease, without children.  So a policy
decides nothing but the order; that a parent never leaves before its children is the index's rule.
"""

import heapq
from typing import Generic, Protocol, TypeVar


class Owner(Protocol):
    """With a hash, the name of a chunk."""

    prefix: bytes
    group: int


class Ranked(Protocol):
    """What a policy and a pool see of a chunk."""

    hash: bytes
    hits: int  # lookups that have used it since it was stored
    stamp: int  # the index's clock at its last use
    ticket: int  # its valid entry in the pool; 0 while it is not in there

    @property
    def space(self) -> Owner: ...


class Policy(Protocol):
    def rank(self, chunk: Ranked) -> int:
        """Asked once, when the chunk becomes evictable; the lowest rank leaves first."""
        ...

    def admitted(self, chunk: Ranked) -> None:
        """The chunk was stored."""
        ...

    def evicted(self, chunk: Ranked) -> None:
        """The chunk had to leave to make room."""
        ...


class Lru:
    """The chunk not used for the longest time leaves first."""

    def rank(self, chunk: Ranked) -> int:
        return chunk.stamp

    def admitted(self, chunk: Ranked) -> None: ...

    def evicted(self, chunk: Ranked) -> None: ...


Name = tuple[bytes, int, bytes]


class Lrfu:
    """As LRU, but a chunk counts as more recently used the more often it was used: its first use and each
    doubling are worth one usual stay.

    The usual stay is how long a chunk that was never used had lain there when it left.  So the worth of a use
    follows capacity and load, and what is protected too well shortens it.
    Uses are remembered beyond eviction: a chunk that is stored again was needed, there or not.
    """

    _AVERAGE_BITS = 8  # the usual stay is an average over some 2 ** 8 chunks

    def __init__(self, remembered: int = 65_536) -> None:
        self._remembered = remembered  # evicted chunks at least; at most twice as many, in some 20 MB
        self._uses: dict[Name, int] = {}  # of chunks that have left
        self._uses_before: dict[Name, int] = {}  # the same, an older generation
        self._usual_stay = 0  # scaled by 2 ** _AVERAGE_BITS
        self._now = 0
        self._watching_since: int | None = None

    def rank(self, chunk: Ranked) -> int:
        self._now = max(self._now, chunk.stamp)
        return chunk.stamp + (self._usual_stay >> self._AVERAGE_BITS) * self._uses_of(chunk).bit_length()

    def admitted(self, chunk: Ranked) -> None:
        self._now = max(self._now, chunk.stamp)

    def evicted(self, chunk: Ranked) -> None:
        if self._watching_since is None:  # across a restart, stamps tell an order but no distance
            self._watching_since = self._now
        uses = self._uses_of(chunk)
        if not uses:
            stay = self._now - max(chunk.stamp, self._watching_since)
            self._usual_stay += stay - (self._usual_stay >> self._AVERAGE_BITS)
        self._uses[_name(chunk)] = uses + 1  # the one that may bring it back
        if len(self._uses) >= self._remembered:
            self._uses, self._uses_before = {}, self._uses

    def _uses_of(self, chunk: Ranked) -> int:
        name = _name(chunk)
        return chunk.hits + (self._uses.get(name) or self._uses_before.get(name, 0))


def _name(chunk: Ranked) -> Name:
    return chunk.space.prefix, chunk.space.group, chunk.hash


POLICIES: dict[str, type[Policy]] = {"lru": Lru, "lrfu": Lrfu}
DEFAULT_POLICY = "lrfu"  # docs/eviction.md has the figures

C = TypeVar("C", bound=Ranked)


class Pool(Generic[C]):
    """A heap of evictable chunks.  Leaving it early is a cleared ticket, found stale when it comes up."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._heap: list[tuple[int, int, C]] = []
        self._last_ticket = 0
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, chunk: C) -> None:
        assert not chunk.ticket, "a chunk is in its pool once"
        self._last_ticket += 1
        chunk.ticket = self._last_ticket
        self._size += 1
        heapq.heappush(self._heap, (self.policy.rank(chunk), chunk.ticket, chunk))
        if len(self._heap) > 2 * self._size + 64:
            self._heap = [entry for entry in self._heap if entry[2].ticket == entry[1]]
            heapq.heapify(self._heap)

    def discard(self, chunk: C) -> None:
        if chunk.ticket:
            chunk.ticket = 0
            self._size -= 1

    def pop(self) -> C | None:
        while self._heap:
            _, ticket, chunk = heapq.heappop(self._heap)
            if chunk.ticket == ticket:
                self.discard(chunk)
                return chunk
        return None
