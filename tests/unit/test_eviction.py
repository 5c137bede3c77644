"""Pools hand out the lowest rank first; policies rank what they should keep higher."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count, islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_server.eviction import DEFAULT_POLICY, POLICIES, Lrfu, Lru, Policy, Pool
from cache_server.index import Index, Space
from cache_server.protocol.keys import SlotRef
from kit import chain

SIZE = 4096
SPACE = Space(b"a model's prefix", 0, SIZE, 0)
STAY = 100


@dataclass(eq=False)
class Leaf:
    """A chunk as a policy sees it."""

    hash: bytes = b""
    stamp: int = 0
    hits: int = 0
    ticket: int = 0
    space: Space = field(default=SPACE)


def drained(pool: Pool[Leaf]) -> list[Leaf]:
    return list(iter(pool.pop, None))


# --- the pool


def test_the_lowest_rank_leaves_first() -> None:
    pool: Pool[Leaf] = Pool(Lru())
    leaves = [Leaf(stamp=stamp) for stamp in (3, 1, 4, 2)]
    for leaf in leaves:
        pool.add(leaf)
    assert len(pool) == 4
    assert [leaf.stamp for leaf in drained(pool)] == [1, 2, 3, 4]
    assert len(pool) == 0
    assert not any(leaf.ticket for leaf in leaves)


def test_of_equal_ranks_the_first_to_enter_leaves_first() -> None:
    pool: Pool[Leaf] = Pool(Lru())
    leaves = [Leaf(stamp=7) for _ in range(100)]
    for leaf in leaves:
        pool.add(leaf)
    assert drained(pool) == leaves


def test_a_discarded_chunk_does_not_leave() -> None:
    pool: Pool[Leaf] = Pool(Lru())
    old, new = Leaf(stamp=1), Leaf(stamp=2)
    pool.add(old)
    pool.add(new)
    pool.discard(old)
    pool.discard(old)  # as drop() does for what was not in the pool
    assert len(pool) == 1
    assert drained(pool) == [new]
    pool.discard(new)
    assert len(pool) == 0


def test_a_chunk_that_came_back_leaves_once_and_by_its_new_rank() -> None:
    pool: Pool[Leaf] = Pool(Lru())
    used, other = Leaf(stamp=1), Leaf(stamp=2)
    pool.add(used)
    pool.add(other)
    pool.discard(used)
    used.stamp = 3
    pool.add(used)
    assert drained(pool) == [other, used]


def test_a_chunk_is_in_its_pool_once() -> None:
    pool: Pool[Leaf] = Pool(Lru())
    leaf = Leaf()
    pool.add(leaf)
    with pytest.raises(AssertionError):
        pool.add(leaf)


@pytest.mark.parametrize("steps", range(1000, 1100))
def test_stale_entries_do_not_pile_up(steps: int) -> None:
    pool: Pool[Leaf] = Pool(Lru())
    leaves = [Leaf() for _ in range(50)]
    for step in range(steps):
        leaf = leaves[step * 17 % 50]
        pool.discard(leaf)
        leaf.stamp = step * 7919 % 1009  # all over the heap
        pool.add(leaf)
        assert len(pool._heap) <= 2 * len(pool) + 64
    assert [leaf.stamp for leaf in drained(pool)] == sorted(leaf.stamp for leaf in leaves)


@given(st.lists(st.tuples(st.sampled_from(("add", "discard", "pop")), st.integers(0, 9), st.integers(0, 5))))
def test_a_pool_is_a_sorted_list_of_what_is_in_it(steps: list[tuple[str, int, int]]) -> None:
    pool: Pool[Leaf] = Pool(Lru())
    leaves = [Leaf() for _ in range(10)]
    inside: list[Leaf] = []  # in the order of entry, which decides ties
    for step, which, stamp in steps:
        leaf = leaves[which]
        if step == "add" and leaf not in inside:
            leaf.stamp = stamp
            pool.add(leaf)
            inside.append(leaf)
        elif step == "discard":
            pool.discard(leaf)
            inside = [other for other in inside if other is not leaf]
        elif step == "pop":
            expected = min(inside, key=lambda other: other.stamp, default=None)
            assert pool.pop() is expected
            inside = [other for other in inside if other is not expected]
        assert len(pool) == len(inside)


# --- all policies


class Cache:
    """An index of `capacity` chunks, asked for prompts: what is missing is stored."""

    def __init__(self, policy: str, capacity: int) -> None:
        self.index = Index(POLICIES[policy])
        self.capacity = capacity
        self.space = self.index.space(SPACE.prefix, 0, SIZE, 0)
        self.left: list[bytes] = []

    def ask(self, prompt: list[bytes]) -> int:
        """-> how many chunks were there"""
        found = self.index.longest_prefix([self.space], prompt)
        last = self.index.use(self.space, prompt, found).ends[0] if found else None
        if last:
            self.index.lease(last)
        excess = len(self.index) + len(prompt) - found - self.capacity
        if excess > 0:
            leaving = self.index.evict(SIZE, excess)
            assert leaving is not None
            self.left += [chunk.hash for chunk in leaving]
        for hash_, parent in zip(prompt[found:], [b"", *prompt][found:], strict=False):
            self.index.admit(self.space, hash_, parent, SlotRef(0, 1, 0))
        if last:
            self.index.unlease(last)
        return found


def one_shots(chunks: int) -> Iterator[list[bytes]]:
    return (chain(chunks, f"one-shot {number}") for number in count())


def test_the_default_is_one_of_them() -> None:
    assert DEFAULT_POLICY in POLICIES


@pytest.mark.parametrize("policy", POLICIES)
def test_what_does_not_fit_at_once_leaves_oldest_first(policy: str) -> None:
    cache = Cache(policy, 8)
    prompts = list(islice(one_shots(2), 10))
    for prompt in prompts:
        cache.ask(prompt)
    assert cache.left == [hash_ for prompt in prompts[:6] for hash_ in reversed(prompt)]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_requests_have_the_same_outcome(policy: str) -> None:
    def leaving() -> list[bytes]:
        cache = Cache(policy, 40)
        for number, scan in enumerate(islice(one_shots(3), 300)):
            cache.ask(chain(5, f"conversation {number % 7}")[: 2 + number % 4])
            cache.ask(scan)
        return cache.left

    assert leaving()
    assert leaving() == leaving()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pattern_that_is_over_leaves(policy: str) -> None:
    """However popular it was."""
    cache = Cache(policy, 100)
    scans = one_shots(4)
    popular = chain(20, "popular")
    for _ in range(200):
        cache.ask(popular)
        cache.ask(next(scans))
    for scan in islice(scans, 1000):
        cache.ask(scan)
    assert cache.ask(popular) == 0


def hits_among_one_shots(policy: str) -> int:
    """A prompt comes again and again, but more is stored between two times than there is room for."""
    cache = Cache(policy, 100)
    scans = one_shots(12)
    prompt = chain(20, "again and again")
    hits = 0
    for _ in range(100):
        hits += cache.ask(prompt)
        for scan in islice(scans, 10):
            cache.ask(scan)
    return hits


def test_lru_forgets_among_one_shots_what_lrfu_keeps() -> None:
    assert hits_among_one_shots("lru") == 0
    assert hits_among_one_shots("lrfu") > 1800  # of 1980


def test_in_a_window_group_every_chunk_stands_for_itself() -> None:
    index = Index(Lrfu)
    space = index.space(SPACE.prefix, 1, SIZE, 2)
    hashes = chain(4)
    for hash_ in hashes:
        index.admit(space, hash_, b"", SlotRef(0, 1, 0))
    for chunk in (used := index.use(space, hashes, 2).ends):
        index.lease(chunk)
    for chunk in used:
        index.unlease(chunk)
    leaving = index.evict(SIZE, 4)
    assert leaving is not None
    assert [chunk.hash for chunk in leaving] == [*hashes[2:], *hashes[:2]]


# --- LRU


def test_lru_counts_nothing_but_the_last_use() -> None:
    policy = Lru()
    assert policy.rank(Leaf(stamp=5, hits=1000)) < policy.rank(Leaf(stamp=6))


# --- LRFU


def settled(policy: Lrfu) -> int:
    """Has seen chunks leave unused after `STAY` for long enough -> its clock."""
    end = 30 * STAY
    for now in range(end):
        policy.admitted(Leaf(stamp=now))
        if now >= STAY:
            policy.evicted(Leaf(chain(1, str(now))[0], stamp=now - STAY))
    return end


def test_while_nothing_has_left_lrfu_is_lru() -> None:
    policy = Lrfu()
    assert policy.rank(Leaf(stamp=5, hits=1000)) < policy.rank(Leaf(stamp=6))


def test_every_doubling_of_the_uses_is_worth_one_usual_stay() -> None:
    policy = Lrfu()
    now = settled(policy)
    worth = [policy.rank(Leaf(stamp=now, hits=hits)) - now for hits in (0, 1, 2, 3, 4, 8, 1023)]
    assert worth == [0, STAY, 2 * STAY, 2 * STAY, 3 * STAY, 4 * STAY, 10 * STAY]


def test_a_used_chunk_leaves_when_it_has_lain_long_enough() -> None:
    policy = Lrfu()
    now = settled(policy)
    used = policy.rank(Leaf(stamp=now, hits=1))
    assert policy.rank(Leaf(stamp=now + STAY - 1)) < used < policy.rank(Leaf(stamp=now + STAY + 1))


def test_uses_are_remembered_beyond_eviction() -> None:
    policy = Lrfu()
    now = settled(policy)
    policy.evicted(Leaf(b"once used", stamp=now, hits=1))
    back = Leaf(b"once used", stamp=now)
    policy.admitted(back)
    assert policy.rank(back) - now == 2 * STAY  # its use before, and that it is needed again
    back.hits = 2
    policy.evicted(back)
    assert policy.rank(Leaf(b"once used", stamp=now)) - now == 3 * STAY  # used 1 + 1 + 2 + 1 times
    assert policy.rank(Leaf(b"another", stamp=now)) == now


def test_a_chunk_of_another_group_or_prefix_is_another_chunk() -> None:
    policy = Lrfu()
    now = settled(policy)
    policy.evicted(Leaf(b"hash", stamp=now))
    assert policy.rank(Leaf(b"hash", stamp=now)) > now
    assert policy.rank(Leaf(b"hash", stamp=now, space=Space(SPACE.prefix, 1, SIZE, 0))) == now
    assert policy.rank(Leaf(b"hash", stamp=now, space=Space(b"another prefix..", 0, SIZE, 0))) == now


def test_a_cleared_space_does_not_make_a_chunk_forgotten() -> None:
    """A space without chunks is taken out of the index; it comes back as another object."""
    policy = Lrfu()
    now = settled(policy)
    policy.evicted(Leaf(b"hash", stamp=now))
    again = Space(SPACE.prefix, SPACE.group, SIZE, 0)
    assert policy.rank(Leaf(b"hash", stamp=now, space=again)) > now


def test_what_is_remembered_is_bounded_and_the_latest() -> None:
    policy = Lrfu(remembered=1000)
    now = settled(policy)
    for number in range(5_000):
        policy.evicted(Leaf(b"%d" % number, stamp=now - STAY))
        assert len(policy._uses) + len(policy._uses_before) <= 2 * 1000
    ranks = [policy.rank(Leaf(b"%d" % number, stamp=now)) for number in range(5_000)]
    assert min(ranks[-1000:]) > now
    assert set(ranks[:-2000]) == {now}


def test_one_chunk_evicted_often_does_not_push_the_others_out() -> None:
    policy = Lrfu(remembered=10)
    now = settled(policy)
    policy.evicted(Leaf(b"other", stamp=now))
    for _ in range(1000):
        policy.evicted(Leaf(b"thrashing", stamp=now))
    assert policy.rank(Leaf(b"other", stamp=now)) > now


def test_the_usual_stay_follows_the_load() -> None:
    policy = Lrfu()
    now = settled(policy)
    for step in range(5_000):
        policy.admitted(Leaf(stamp=now + step))
        policy.evicted(Leaf(b"%d" % step, stamp=now + step - 10))
    assert policy.rank(Leaf(stamp=now, hits=1)) - now == 10


def test_used_chunks_that_stayed_longer_do_not_lengthen_the_usual_stay() -> None:
    """Or what is protected would protect itself ever better."""
    policy = Lrfu()
    now = settled(policy)
    for number in range(5_000):
        policy.evicted(Leaf(b"%d" % number, stamp=now - 20 * STAY, hits=3))
    assert policy.rank(Leaf(stamp=now, hits=1)) - now == STAY


def test_stamps_from_before_a_restart_do_not_make_stays_endless() -> None:
    """Restored chunks are dated by generation; each start of the server leaves out 2 ** 40 of them."""
    policy: Policy = Lrfu()
    restored = [Leaf(b"%d %d" % (boot, n), stamp=(boot << 40) + n) for boot in (1, 2) for n in range(1000)]
    for leaf in restored:
        policy.admitted(leaf)
    now = restored[-1].stamp
    for step, leaf in enumerate(restored, 1):
        policy.admitted(Leaf(b"%d" % step, stamp=now + step))
        policy.evicted(leaf)
    now += len(restored)
    assert policy.rank(Leaf(stamp=now, hits=1)) - now < len(restored)
