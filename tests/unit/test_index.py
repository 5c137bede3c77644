"""The forest of prefixes: found by bisection, held by its last chunk, evicted from its leaves."""

from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_server.eviction import Lru
from cache_server.index import Admission, Chunk, Index, Space
from cache_server.protocol.keys import SlotRef, split_slot_refs
from kit import chain

SIZE = 4096
PREFIX = b"a model's prefix"
OTHER_PREFIX = b"another prefix.."

Path = tuple[int, ...]
PATHS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(tuple)


def slot_refs() -> Iterator[SlotRef]:
    return (SlotRef(number * SIZE, number + 1, number) for number in count())


def new_space(index: Index, group: int = 0, window: int = 0, prefix: bytes = PREFIX) -> Space:
    return index.space(prefix, group, SIZE, window)


def hash_of(path: Path) -> bytes:
    return chain(1, str(path))[0]


def hashes_to(path: Path) -> list[bytes]:
    return [hash_of(path[:length]) for length in range(1, len(path) + 1)]


def admit(index: Index, space: Space, path: Path, slots: Iterator[SlotRef]) -> Chunk | Admission:
    return index.admit(space, hash_of(path), hash_of(path[:-1]) if path[:-1] else b"", next(slots))


def grow(paths: list[Path]) -> tuple[Index, Space]:
    """An index of these paths and all that leads to them."""
    index, slots = Index(Lru), slot_refs()
    space = new_space(index)
    for path in paths:
        for length in range(1, len(path) + 1):
            admit(index, space, path[:length], slots)
    return index, space


def stored(index: Index) -> set[bytes]:
    return {hash_ for space in index.spaces for hash_ in space.chunks}


def use(index: Index, space: Space, path: Path) -> None:
    """As a lookup does: what is found is leased for a while."""
    length = index.longest_prefix([space], hashes_to(path))
    if length:
        (last,) = index.use(space, hashes_to(path), length).ends
        index.lease(last)
        index.unlease(last)


# --- the longest prefix


@given(st.lists(PATHS, max_size=12), PATHS)
def test_bisection_finds_what_a_walk_finds(paths: list[Path], asked: Path) -> None:
    index, space = grow(paths)
    hashes = hashes_to(asked)
    walked = next((n for n, hash_ in enumerate(hashes) if hash_ not in space.chunks), len(hashes))
    assert index.longest_prefix([space], hashes) == walked
    if walked:
        used = index.use(space, hashes, walked)
        assert split_slot_refs(used.refs) == [space.chunks[hash_].slot for hash_ in hashes[:walked]]
        assert [chunk.hash for chunk in used.ends] == [hashes[walked - 1]]


@given(
    chained=st.lists(st.integers(0, 8), min_size=1, max_size=2),
    windows=st.lists(st.tuples(st.integers(1, 4), st.sets(st.integers(0, 7))), max_size=3),
)
def test_a_prefix_is_found_as_far_as_every_group_supplies_it(
    chained: list[int], windows: list[tuple[int, set[int]]]
) -> None:
    index, slots, hashes = Index(Lru), slot_refs(), chain(8)
    spaces = []
    for length in chained:
        spaces.append(space := new_space(index, len(spaces)))
        for at in range(length):
            index.admit(space, hashes[at], hashes[at - 1] if at else b"", next(slots))
    for window, present in windows:
        spaces.append(space := new_space(index, len(spaces), window))
        for at in present:
            index.admit(space, hashes[at], b"", next(slots))

    def supplied(length: int) -> bool:
        return all(
            hash_ in space.chunks
            for space in spaces
            for hash_ in hashes[max(0, length - space.window) if space.window else 0 : length]
        )

    assert index.longest_prefix(spaces, hashes) == max(filter(supplied, range(9)))


def test_a_chunk_at_another_depth_is_no_part_of_the_prefix() -> None:
    index, space = grow([(0, 0, 0)])
    assert index.longest_prefix([space], hashes_to((0, 0, 0))[1:]) == 0
    assert index.longest_prefix([space], [hash_of((0,)), hash_of((0, 0, 0))]) == 1


def test_a_window_group_supplies_its_last_chunks_only() -> None:
    index, slots, hashes = Index(Lru), slot_refs(), chain(6)
    space = new_space(index, window=2)
    for hash_ in hashes[3:5]:
        assert isinstance(index.admit(space, hash_, b"", next(slots)), Chunk)
    assert index.longest_prefix([space], hashes) == 5
    assert [chunk.hash for chunk in index.use(space, hashes, 5).ends] == hashes[3:5]


def test_one_key_in_two_groups_or_namespaces_is_two_chunks() -> None:
    index, slots = Index(Lru), slot_refs()
    spaces = [new_space(index), new_space(index, group=1), new_space(index, prefix=OTHER_PREFIX)]
    for space in spaces:
        assert isinstance(admit(index, space, (0,), slots), Chunk)
    assert len(index) == 3
    assert len(index.spaces) == 3


# --- admission


def test_a_key_is_stored_once_and_under_a_stored_parent() -> None:
    index, slots = Index(Lru), slot_refs()
    space = new_space(index)
    assert admit(index, space, (0, 1), slots) is Admission.ORPHAN
    assert len(index) == 0
    assert index.spaces == []
    admit(index, space, (0,), slots)
    assert admit(index, space, (0,), slots) is Admission.EXISTS
    child = admit(index, space, (0, 1), slots)
    assert isinstance(child, Chunk)
    assert child.parent is space.chunks[hash_of((0,))]
    assert child.depth == 2


def test_a_space_has_one_slot_size_and_window() -> None:
    index, _ = grow([(0,)])
    with pytest.raises(AssertionError, match="covers both"):
        index.space(PREFIX, 0, SIZE, 1)
    with pytest.raises(AssertionError, match="covers both"):
        index.space(PREFIX, 0, 2 * SIZE, 0)


# --- leases


def test_a_lease_on_the_last_chunk_holds_its_whole_prefix_and_nothing_else() -> None:
    index, space = grow([(0, 0, 0), (0, 1), (2,)])
    last = space.chunks[hash_of((0, 0, 0))]
    index.lease(last)
    assert index.evict(SIZE, 3) is None
    leaving = index.evict(SIZE, 2)
    assert leaving is not None
    assert {chunk.hash for chunk in leaving} == {hash_of((0, 1)), hash_of((2,))}
    index.unlease(last)
    leaving = index.evict(SIZE, 3)
    assert leaving is not None
    assert [chunk.depth for chunk in leaving] == [3, 2, 1]


def test_two_leases_hold_until_both_have_ended() -> None:
    index, space = grow([(0,)])
    chunk = space.chunks[hash_of((0,))]
    index.lease(chunk)
    index.lease(chunk)
    index.unlease(chunk)
    assert index.evict(SIZE, 1) is None
    index.unlease(chunk)
    assert index.evict(SIZE, 1) == [chunk]
    with pytest.raises(AssertionError, match="ends once"):
        index.unlease(chunk)


def test_a_leased_middle_holds_itself_not_what_comes_after_it() -> None:
    index, space = grow([(0, 0, 0)])
    index.lease(space.chunks[hash_of((0, 0))])
    leaving = index.evict(SIZE, 1)
    assert leaving is not None
    assert leaving[0].depth == 3
    assert index.evict(SIZE, 1) is None


# --- eviction


class NaiveLru:
    """The same forest as a plain dict: path -> when it was last used."""

    def __init__(self, paths: list[Path]) -> None:
        self.used: dict[Path, int] = {}
        self.clock = 0
        for path in paths:
            for length in range(1, len(path) + 1):
                if path[:length] not in self.used:
                    self.clock += 1
                    self.used[path[:length]] = self.clock

    def use(self, asked: Path) -> None:
        self.clock += 1
        for length in range(1, len(asked) + 1):
            if asked[:length] not in self.used:
                break
            self.used[asked[:length]] = self.clock

    def evict(self, wanted: int, held: set[Path]) -> list[Path] | None:
        left = dict(self.used)
        leaving: list[Path] = []
        while len(leaving) < wanted:
            leaves = [
                path for path in left if path not in held and not any(other[:-1] == path for other in left)
            ]
            if not leaves:
                return None
            leaving.append(min(leaves, key=left.__getitem__))
            del left[leaving[-1]]
        self.used = left
        return leaving


@given(
    paths=st.lists(PATHS, min_size=1, max_size=10),
    steps=st.lists(st.tuples(PATHS, st.integers(0, 4)), max_size=10),
    held=st.sets(st.integers(0, 30), max_size=3),
)
def test_leaves_leave_in_the_order_of_their_last_use(
    paths: list[Path], steps: list[tuple[Path, int]], held: set[int]
) -> None:
    index, space = grow(paths)
    naive = NaiveLru(paths)
    holding = {path for at, path in enumerate(naive.used) if at in held}
    for path in holding:
        index.lease(space.chunks[hash_of(path)])
    for asked, wanted in steps:
        use(index, space, asked)
        naive.use(asked)
        leaving = index.evict(SIZE, wanted)
        expected = naive.evict(wanted, holding)
        assert (leaving and [chunk.hash for chunk in leaving]) == (expected and list(map(hash_of, expected)))
        assert stored(index) == set(map(hash_of, naive.used))


@given(st.lists(PATHS, min_size=1, max_size=10), st.lists(PATHS, max_size=6), st.integers(0, 40))
def test_an_eviction_that_fails_changes_nothing(paths: list[Path], used: list[Path], held: int) -> None:
    tried, space = grow(paths)
    twin, twin_space = grow(paths)
    for each, its_space in ((tried, space), (twin, twin_space)):
        for path in used:
            use(each, its_space, path)
    leased = hash_of((*paths[held % len(paths)],))
    tried.lease(space.chunks[leased])
    twin.lease(twin_space.chunks[leased])
    assert tried.evict(SIZE, len(tried)) is None
    assert stored(tried) == stored(twin)
    tried.unlease(space.chunks[leased])
    twin.unlease(twin_space.chunks[leased])
    for _ in range(len(twin)):  # the same order of leaving, chunk by chunk
        ours, theirs = tried.evict(SIZE, 1), twin.evict(SIZE, 1)
        assert ours is not None
        assert theirs is not None
        assert ours[0].hash == theirs[0].hash
    assert len(tried) == 0
    assert tried.spaces == []


def test_only_chunks_of_the_same_slot_size_make_room() -> None:
    index, _ = grow([(0,), (1,)])
    assert index.evict(2 * SIZE, 1) is None
    bigger = index.space(PREFIX, 1, 2 * SIZE, 0)
    admit(index, bigger, (0,), slot_refs())
    leaving = index.evict(2 * SIZE, 1)
    assert leaving is not None
    assert leaving[0].space is bigger
    assert len(index) == 2


# --- dropping


def test_a_family_leaves_children_first_leased_or_not() -> None:
    index, space = grow([(0, 0, 0), (0, 1), (1,)])
    leased = space.chunks[hash_of((0, 0, 0))]
    index.lease(leased)
    family = index.family([space.chunks[hash_of((0,))]])
    assert [chunk.depth for chunk in family] == [3, 2, 2, 1]
    index.drop(family)
    assert stored(index) == {hash_of((1,))}
    index.unlease(leased)  # its reader is done with what is no longer there
    leaving = index.evict(SIZE, 1)
    assert leaving is not None
    assert leaving[0].hash == hash_of((1,))
    assert index.evict(SIZE, 1) is None


def test_a_lease_on_a_dropped_chunk_does_not_touch_its_successor() -> None:
    index, space = grow([(0,)])
    old = space.chunks[hash_of((0,))]
    index.lease(old)
    index.drop(index.family([old]))
    new = admit(index, new_space(index), (0,), slot_refs())
    assert isinstance(new, Chunk)
    index.lease(new)
    index.unlease(old)
    assert index.evict(SIZE, 1) is None
    index.unlease(new)
    assert index.evict(SIZE, 1) == [new]


def test_dropping_children_makes_their_parent_evictable() -> None:
    index, space = grow([(0, 0)])
    index.drop(index.family([space.chunks[hash_of((0, 0))]]))
    leaving = index.evict(SIZE, 1)
    assert leaving is not None
    assert leaving[0].hash == hash_of((0,))


def test_a_family_of_overlapping_roots_names_each_chunk_once() -> None:
    index, space = grow([(0, 0, 0)])
    everything = list(space.chunks.values())
    assert sorted(chunk.depth for chunk in index.family(everything)) == [1, 2, 3]


def test_a_chunk_that_could_leave_has_counted_each_use_of_it_and_of_what_followed_it() -> None:
    index, space = grow([(0, 0), (0, 1)])
    for path in ((0,), (0, 0), (0, 1), (0, 1)):
        use(index, space, path)
    assert [chunk.hits for chunk in index.evict(SIZE, 2) or ()] == [1, 2]
    assert space.chunks[hash_of((0,))].hits == 4


def test_an_eviction_that_is_called_off_counts_no_use_twice() -> None:
    index, space = grow([(0, 0)])
    use(index, space, (0, 0))
    assert index.evict(SIZE, 3) is None
    assert [chunk.hits for chunk in index.evict(SIZE, 2) or ()] == [1, 1]


def test_that_a_chunk_was_stored_is_no_use_of_what_comes_before() -> None:
    index, space = grow([(0, 0), (0, 1)])
    first = space.chunks[hash_of((0,))]
    stored_at = first.stamp
    assert index.evict(SIZE, 2) is not None
    assert first.stamp == stored_at
