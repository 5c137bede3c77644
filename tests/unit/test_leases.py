"""Leases: replaced by name, ended in order, counted."""

import pytest

from cache_server.eviction import Lru
from cache_server.index import Chunk, Index
from cache_server.leases import Leases
from cache_server.protocol.keys import SlotRef
from kit import chain

LEASE_MS = 100


@pytest.fixture
def index() -> Index:
    return Index(Lru)


@pytest.fixture
def chunks(index: Index) -> list[Chunk]:
    """Four that stand alone."""
    space = index.space(b"prefix", 0, 4096, 0)
    return [index.adopt(space, hash_, None, SlotRef(0, n + 1, n), n) for n, hash_ in enumerate(chain(4))]


@pytest.fixture
def leases(index: Index) -> Leases:
    return Leases(index, LEASE_MS)


def evictable(index: Index) -> int:
    return next(count for count in range(5, -1, -1) if _could(index, count))


def _could(index: Index, count: int) -> bool:
    leaving = index.evict(4096, count)
    for chunk in leaving or ():
        index.adopt(chunk.space, chunk.hash, None, chunk.slot, chunk.stamp)
    return leaving is not None


def test_a_lease_holds_its_chunks_until_it_is_released(
    index: Index, chunks: list[Chunk], leases: Leases
) -> None:
    leases.grant("engine", "request", chunks[:2], 0)
    assert evictable(index) == 2
    assert leases.release("engine", "request")
    assert not leases.release("engine", "request")
    assert evictable(index) == 4
    assert (leases.granted, leases.released, leases.expired, len(leases)) == (1, 1, 0, 0)


def test_a_name_is_one_lease_per_engine(index: Index, chunks: list[Chunk], leases: Leases) -> None:
    leases.grant("one", "request", chunks[:1], 0)
    leases.grant("two", "request", chunks[1:2], 0)
    assert (len(leases), leases.of("one"), leases.of("two"), leases.of("three")) == (2, 1, 1, 0)
    assert not leases.release("three", "request")
    leases.release("one", "request")
    assert (len(leases), leases.of("one"), leases.of("two")) == (1, 0, 1)
    assert evictable(index) == 3


def test_the_same_name_again_takes_the_first_ones_place(
    index: Index, chunks: list[Chunk], leases: Leases
) -> None:
    leases.grant("engine", "request", chunks[:2], 0)
    leases.grant("engine", "request", chunks[1:2], 50)
    assert chunks[1].leases == 1
    assert chunks[0].leases == 0
    assert evictable(index) == 3
    assert (len(leases), leases.of("engine")) == (1, 1)
    leases.expire(LEASE_MS)  # when the first one would have ended
    assert len(leases) == 1
    leases.expire(50 + LEASE_MS)
    assert len(leases) == 0


def test_the_same_chunk_in_a_new_lease_is_never_free_in_between(
    index: Index, chunks: list[Chunk], leases: Leases
) -> None:
    leases.grant("engine", "request", chunks[:1], 0)
    leases.grant("engine", "request", chunks[:1], 1)
    assert chunks[0].leases == 1
    assert chunks[0].ticket == 0


def test_they_end_at_their_time_in_the_order_of_granting(chunks: list[Chunk], leases: Leases) -> None:
    for n, chunk in enumerate(chunks):
        leases.grant("engine", f"request {n}", [chunk], 10 * n)
    leases.expire(LEASE_MS - 1)
    assert len(leases) == 4
    leases.expire(LEASE_MS)
    assert [chunk.leases for chunk in chunks] == [0, 1, 1, 1]
    leases.expire(LEASE_MS + 20)
    assert [chunk.leases for chunk in chunks] == [0, 0, 0, 1]
    assert (leases.expired, leases.of("engine")) == (3, 1)


def test_a_renewed_lease_ends_after_those_that_were_granted_meanwhile(
    chunks: list[Chunk], leases: Leases
) -> None:
    leases.grant("engine", "first", chunks[:1], 0)
    leases.grant("engine", "second", chunks[1:2], 10)
    leases.grant("engine", "first", chunks[:1], 20)
    leases.expire(LEASE_MS + 10)
    assert leases.release("engine", "first")
    assert not leases.release("engine", "second")


def test_a_gone_engine_holds_nothing(index: Index, chunks: list[Chunk], leases: Leases) -> None:
    for n in range(3):
        leases.grant("gone", f"request {n}", [chunks[n]], 0)
    leases.grant("here", "request", [chunks[0]], 0)
    leases.release_all("gone")
    assert (len(leases), leases.of("gone"), leases.of("here")) == (1, 0, 1)
    assert evictable(index) == 3
    leases.release_all("gone")
    leases.release_all("never seen")
    leases.expire(LEASE_MS)
    assert (leases.granted, leases.released, leases.expired) == (4, 3, 1)
