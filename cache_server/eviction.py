"""Which chunk leaves first: a policy ranks chunks, a pool hands out the lowest rank.

A pool holds the chunks that may leave *now*: complete, without a lease, without children.  So a policy
decides nothing but the order; that a parent never leaves before its children is the index's rule.
"""

import heapq
from typing import Generic, Protocol, TypeVar


class Ranked(Protocol):
    """What a policy and a pool see of a chunk."""

    hash: bytes
    hits: int  # lookups that have used it since it was stored
    stamp: int  # the index's clock at its last use
    ticket: int  # its valid entry in the pool; 0 while it is not in there


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


POLICIES: dict[str, type[Policy]] = {"lru": Lru}
DEFAULT_POLICY = "lru"

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
