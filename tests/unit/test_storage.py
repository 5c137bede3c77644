"""Who makes room for whom, and what a new server finds again."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_server.arena import Arena, Key
from cache_server.eviction import Lru
from cache_server.index import Chunk, Index, Space
from cache_server.protocol.keys import SlotRef
from cache_server.protocol.messages import Outcome
from cache_server.protocol.slots import ENTRY_BYTES, Geometry, holds
from cache_server.storage import Shortage, Storage
from kit import KIB, SLAB_BYTES, chain, new_file

SMALL, MIDDLE, BIG = 4 * KIB, 8 * KIB, 16 * KIB  # 4, 2 and 1 to a slab
A, B, C = b"engine A's owner", b"engine B's owner", b"engine C's owner"
PREFIXES = {SMALL: b"prefix of small.", MIDDLE: b"prefix of middle", BIG: b"prefix of bigger"}


class Disk:
    """An arena file and the storage over it."""

    def __init__(self, slabs: int = 4, *, populated: bool = True) -> None:
        self.geometry = Geometry(slabs * SLAB_BYTES, SLAB_BYTES)
        self.file = new_file(self.geometry, populated=populated)
        self.boots = 0
        self.storage = self.restart()

    def restart(self) -> Storage:
        self.boots += 1
        self.storage = Storage(Arena(self.file, self.geometry, self.boots), Index(Lru))
        return self.storage

    def space(self, size: int, window: int = 0) -> Space:
        return self.storage.index.space(PREFIXES[size], window, size, window)

    def reserve(self, size: int, count: int, owner: bytes, in_use: Sequence[int] = ()) -> list[SlotRef]:
        slots = self.storage.reserve(size, count, owner, in_use)
        assert not isinstance(slots, Shortage)
        return slots

    def commit(
        self, size: int, owner: bytes, slots: Sequence[SlotRef], hashes: Sequence[bytes], parent: bytes = b""
    ) -> bytes:
        names = [(slot.generation, slot.number) for slot in slots]
        chunks = list(zip(hashes, names, strict=True))
        return self.storage.commit(self.space(size), owner, parent, chunks)

    def fill(self, size: int, count: int, name: str, owner: bytes = A) -> list[Chunk]:
        """`count` chunks that stand alone, the first one used the longest time ago."""
        hashes = chain(count, name)
        for slot, hash_ in zip(self.reserve(size, count, owner), hashes, strict=True):
            assert self.commit(size, owner, [slot], [hash_]) == bytes([Outcome.STORED])
        return [self.space(size).chunks[hash_] for hash_ in hashes]

    def slabs(self) -> dict[int, int]:
        arena = self.storage.arena
        return {size: len(arena.slabs_of(size)) for size in arena.slot_sizes}

    def picture(self) -> object:
        """All that could have changed."""
        arena, index = self.storage.arena, self.storage.index
        keys = [{h: (c.ref, c.leases, bool(c.ticket)) for h, c in s.chunks.items()} for s in index.spaces]
        reserved = {owner: dict(slots) for owner, slots in arena.reserved.items()}
        return bytes(self.file), keys, reserved, arena.usage(), self.slabs(), self.storage.evicted


@pytest.fixture
def disk() -> Disk:
    return Disk()


def drop(disk: Disk, chunks: Sequence[Chunk]) -> None:
    disk.storage.index.drop(disk.storage.index.family(chunks))
    for chunk in chunks:
        disk.storage.arena.free(chunk.slot)


# --- commit and abort


def test_a_commit_says_for_each_slot_what_became_of_it(disk: Disk) -> None:
    hashes = chain(5)
    slots = disk.reserve(SMALL, 6, A)
    (other,) = disk.reserve(SMALL, 1, B)
    assert disk.commit(SMALL, A, slots[:2], hashes[:2]) == bytes([Outcome.STORED] * 2)
    outcomes = disk.commit(
        SMALL, A, [slots[2], other, slots[3], slots[4]], [hashes[1], hashes[2], hashes[3], hashes[4]]
    )
    assert list(outcomes) == [Outcome.EXISTS, Outcome.FOREIGN, Outcome.ORPHAN, Outcome.ORPHAN]
    assert disk.storage.arena.reserved == {
        A: {slots[5].number: slots[5].generation},
        B: {other.number: other.generation},
    }
    assert len(disk.storage.index) == 2
    assert disk.storage.arena.usage().committed == 2 * SMALL


def test_a_slot_is_committed_once(disk: Disk) -> None:
    (slot,) = disk.reserve(SMALL, 1, A)
    outcomes = disk.commit(SMALL, A, [slot, slot], chain(2))
    assert list(outcomes) == [Outcome.STORED, Outcome.FOREIGN]
    assert list(disk.commit(SMALL, A, [slot], chain(1))) == [Outcome.FOREIGN]


def test_a_slot_of_another_size_is_foreign(disk: Disk) -> None:
    slots = disk.reserve(MIDDLE, 1, A)
    assert list(disk.commit(SMALL, A, slots, chain(1))) == [Outcome.FOREIGN]
    assert disk.storage.abort(A, [(slots[0].generation, slots[0].number)]) == 1


def test_an_abort_takes_only_what_its_sender_reserved(disk: Disk) -> None:
    mine, committed = disk.reserve(SMALL, 2, A)
    (other,) = disk.reserve(SMALL, 1, B)
    disk.commit(SMALL, A, [committed], chain(1))
    names = [(slot.generation, slot.number) for slot in (mine, committed, other)]
    names += [(mine.generation + 1, mine.number), (mine.generation, 1 << 31)]
    assert disk.storage.abort(A, names) == 1
    assert disk.storage.abort(A, names) == 0
    assert disk.storage.abort_all(B) == 1
    assert disk.storage.abort_all(B) == 0
    assert disk.storage.arena.reserved == {}
    assert disk.storage.arena.usage().committed == SMALL


def test_an_abort_that_names_a_slot_twice_takes_it_once(disk: Disk) -> None:
    twice, once = disk.reserve(SMALL, 2, A)
    names = [(slot.generation, slot.number) for slot in (twice, twice, once)]
    assert disk.storage.abort(A, names) == 2
    assert disk.storage.arena.reserved == {}
    assert disk.storage.arena.usage().free == disk.storage.arena.usage().capacity


# --- room of the same size


def test_the_oldest_leave_when_there_is_no_room_left(disk: Disk) -> None:
    chunks = disk.fill(SMALL, 16, "old")
    slots = disk.reserve(SMALL, 3, B, [SMALL])
    assert {slot.number for slot in slots} == {chunk.slot.number for chunk in chunks[:3]}
    assert [chunk.stored for chunk in chunks] == [False] * 3 + [True] * 13
    assert disk.storage.evicted == 3
    assert not any(holds(disk.file, disk.geometry, chunk.slot, chunk.hash) for chunk in chunks[:3])


def test_nothing_leaves_while_there_is_room(disk: Disk) -> None:
    disk.fill(SMALL, 15, "old")
    disk.reserve(SMALL, 1, A, [SMALL])
    assert disk.storage.evicted == 0


def test_a_reservation_is_met_in_full_or_changes_nothing(disk: Disk) -> None:
    chunks = disk.fill(SMALL, 12, "old")
    disk.fill(MIDDLE, 2, "others")
    disk.storage.index.lease(chunks[5])
    before = disk.picture()
    assert disk.storage.reserve(SMALL, 12, B, [SMALL, MIDDLE]) is Shortage.FULL
    assert disk.picture() == before
    assert len(disk.reserve(SMALL, 11, B, [SMALL, MIDDLE])) == 11
    assert chunks[5].stored


def test_reserved_slots_make_no_room(disk: Disk) -> None:
    disk.reserve(SMALL, 16, A)
    before = disk.picture()
    assert disk.storage.reserve(SMALL, 1, B, [SMALL]) is Shortage.FULL
    assert disk.storage.reserve(MIDDLE, 1, B, [SMALL, MIDDLE]) is Shortage.FULL
    assert disk.picture() == before


def test_fresh_memory_is_waited_for_rather_than_anything_evicted() -> None:
    disk = Disk(populated=False)
    arena = disk.storage.arena
    arena.populated(0)
    disk.fill(SMALL, 4, "old")
    assert disk.storage.reserve(SMALL, 1, A, [SMALL]) is Shortage.POPULATING
    arena.population_failed = True  # what there is must do
    assert len(disk.reserve(SMALL, 1, A, [SMALL])) == 1
    assert disk.storage.evicted == 1


# --- room of other sizes


def test_empty_slabs_of_others_are_taken_first(disk: Disk) -> None:
    kept = disk.fill(MIDDLE, 4, "kept")
    drop(disk, disk.fill(MIDDLE, 4, "dropped"))
    disk.reserve(SMALL, 8, A, [SMALL, MIDDLE])
    assert disk.slabs() == {MIDDLE: 2, SMALL: 2}
    assert disk.storage.evicted == 0
    assert all(chunk.stored for chunk in kept)


def test_beyond_the_share_slabs_change_hands_the_coldest_first(disk: Disk) -> None:
    chunks = disk.fill(MIDDLE, 8, "old")
    index = disk.storage.index
    index.use(disk.space(MIDDLE), [chunks[0].hash], 1)  # warms the first slab
    disk.reserve(SMALL, 8, B, [SMALL, MIDDLE])
    assert disk.slabs() == {MIDDLE: 2, SMALL: 2}
    assert [chunk.stored for chunk in chunks] == [True, True, False, False, False, False, True, True]
    assert disk.storage.evicted == 4


def test_down_to_their_share_others_keep_their_slabs(disk: Disk) -> None:
    others = disk.fill(MIDDLE, 4, "others")
    mine = disk.fill(SMALL, 8, "mine", B)
    disk.reserve(SMALL, 4, B, [SMALL, MIDDLE])
    assert disk.slabs() == {MIDDLE: 2, SMALL: 2}
    assert all(chunk.stored for chunk in others)
    assert [chunk.stored for chunk in mine] == [False] * 4 + [True] * 4


def test_nobody_takes_more_than_the_share_of_others() -> None:
    disk = Disk(slabs=6)
    chunks = disk.fill(MIDDLE, 12, "old")
    assert disk.storage.reserve(SMALL, 16, B, [SMALL, MIDDLE]) is Shortage.FULL
    assert all(chunk.stored for chunk in chunks)
    assert len(disk.reserve(SMALL, 12, B, [SMALL, MIDDLE])) == 12
    assert disk.slabs() == {MIDDLE: 3, SMALL: 3}


def test_empty_slabs_count_when_others_give_down_to_their_share() -> None:
    disk = Disk(slabs=12)
    disk.fill(MIDDLE, 8, "kept")
    disk.fill(BIG, 4, "also kept")
    empty = disk.fill(MIDDLE, 4, "dropped")
    disk.fill(BIG, 2, "surplus")
    drop(disk, empty)
    assert disk.slabs() == {MIDDLE: 6, BIG: 6}  # two of the first are empty; everybody's share is four
    disk.reserve(SMALL, 16, C, [SMALL, MIDDLE, BIG])
    assert disk.slabs() == {MIDDLE: 4, BIG: 4, SMALL: 4}


def test_sizes_nobody_uses_any_more_have_no_share(disk: Disk) -> None:
    chunks = disk.fill(MIDDLE, 8, "of an engine that has left")
    disk.reserve(SMALL, 16, B, [SMALL])
    assert disk.slabs() == {SMALL: 4}
    assert disk.storage.evicted == len(chunks)


@pytest.mark.parametrize("hold", ["lease", "reserve"])
def test_slabs_with_leased_or_reserved_slots_stay(hold: str, disk: Disk) -> None:
    chunks = disk.fill(MIDDLE, 7, "old")  # the last slab has one slot left
    if hold == "lease":
        for held in chunks[::2]:
            disk.storage.index.lease(held)
    else:
        drop(disk, chunks[:6:2])
        disk.reserve(MIDDLE, 4, A)
    before = disk.picture()
    assert disk.storage.reserve(SMALL, 1, B, [SMALL]) is Shortage.FULL
    assert disk.picture() == before


def test_a_leased_descendant_in_another_slab_holds_the_slab_of_its_prefix(disk: Disk) -> None:
    hashes = chain(4)
    disk.commit(MIDDLE, A, disk.reserve(MIDDLE, 4, A), hashes)
    disk.fill(MIDDLE, 4, "others")
    last = disk.space(MIDDLE).chunks[hashes[3]]
    disk.storage.index.lease(last)
    assert disk.storage.reserve(SMALL, 16, B, [SMALL]) is Shortage.FULL
    disk.reserve(SMALL, 8, B, [SMALL])
    assert all(disk.space(MIDDLE).chunks[hash_].stored for hash_ in hashes)
    assert disk.slabs() == {MIDDLE: 2, SMALL: 2}


def test_with_a_slab_go_the_chunks_that_hang_on_it(disk: Disk) -> None:
    hashes = chain(8)
    disk.commit(MIDDLE, A, disk.reserve(MIDDLE, 8, A), hashes)
    index = disk.storage.index
    index.use(disk.space(MIDDLE), hashes, 8)
    disk.reserve(SMALL, 4, B, [SMALL, MIDDLE])  # all are equally warm: the first slab goes, and with it all
    assert len(index) == 0
    assert disk.storage.evicted == 8
    assert disk.storage.arena.usage().committed == 0
    assert disk.storage.arena.available(MIDDLE) == 6


# --- clear


def test_clear_drops_leased_chunks_too_and_keeps_other_spaces(disk: Disk) -> None:
    chunks = disk.fill(SMALL, 3, "dropped")
    kept = disk.fill(MIDDLE, 1, "kept")
    disk.storage.index.lease(chunks[0])
    (reserved,) = disk.reserve(SMALL, 1, A)
    assert disk.storage.clear([disk.space(SMALL)]) == 3
    assert len(disk.storage.index) == 1
    assert kept[0].stored
    assert disk.storage.arena.owns(A, reserved.generation, reserved.number)
    assert disk.storage.arena.usage().committed == MIDDLE
    assert disk.storage.clear([disk.space(SMALL)]) == 0
    assert disk.restart().restored == 1


# --- a new server over the same table


def test_a_restart_finds_every_chunk_under_its_parent(disk: Disk) -> None:
    hashes, branch = chain(4), chain(2, "branch")
    disk.commit(SMALL, A, disk.reserve(SMALL, 4, A), hashes)
    disk.commit(SMALL, A, disk.reserve(SMALL, 2, A), branch, hashes[1])
    refs = {hash_: chunk.ref for hash_, chunk in disk.space(SMALL).chunks.items()}
    storage = disk.restart()
    assert storage.restored == 6
    chunks = disk.space(SMALL).chunks
    assert {hash_: chunk.ref for hash_, chunk in chunks.items()} == refs
    assert [chunks[hash_].depth for hash_ in hashes] == [1, 2, 3, 4]
    assert chunks[branch[0]].parent is chunks[hashes[1]]
    assert storage.index.longest_prefix([disk.space(SMALL)], hashes) == 4
    storage.index.lease(chunks[branch[1]])
    assert disk.storage.reserve(SMALL, 13, B, [SMALL]) is Shortage.FULL


def test_a_child_in_an_earlier_slot_than_its_parent_is_found_too(disk: Disk) -> None:
    early, late = disk.reserve(SMALL, 2, A)
    hashes = chain(2)
    disk.commit(SMALL, A, [late], hashes[:1])
    disk.commit(SMALL, A, [early], hashes[1:], hashes[0])  # a lower generation than its parent's
    assert disk.restart().restored == 2
    assert disk.space(SMALL).chunks[hashes[1]].parent is disk.space(SMALL).chunks[hashes[0]]


def test_windows_come_back_without_parents(disk: Disk) -> None:
    space = disk.space(SMALL, window=2)
    slots = disk.reserve(SMALL, 2, A)
    names = [(slot.generation, slot.number) for slot in slots]
    assert list(disk.storage.commit(space, A, chain(9)[8], list(zip(chain(2), names, strict=True)))) == [0, 0]
    assert disk.restart().restored == 2
    assert disk.space(SMALL, window=2).chunks.keys() == set(chain(2))
    assert disk.storage.index.longest_prefix([disk.space(SMALL, window=2)], chain(2)) == 2


def test_orphans_are_freed_and_the_rest_stays(disk: Disk) -> None:
    hashes = chain(4)
    slots = disk.reserve(SMALL, 4, A)
    disk.commit(SMALL, A, slots, hashes)
    at = disk.geometry.entry_at(slots[1].number)
    disk.file[at : at + ENTRY_BYTES] = bytes(range(ENTRY_BYTES))  # torn
    storage = disk.restart()
    assert storage.restored == 1
    assert list(disk.space(SMALL).chunks) == hashes[:1]
    assert storage.arena.usage().free == storage.arena.usage().capacity - SMALL
    assert not holds(disk.file, disk.geometry, slots[3], hashes[3])
    assert disk.restart().restored == 1


def test_a_parent_slot_with_another_content_is_no_parent(disk: Disk) -> None:
    parent, child, later = disk.reserve(SMALL, 3, A)
    hashes = chain(3)
    disk.commit(SMALL, A, [parent, child], hashes[:2])
    storage = disk.storage
    storage.arena.free(parent)  # without its child: only a torn table could say so
    (again,) = storage.arena.reserve(SMALL, 1, A)
    assert again.number == parent.number
    storage.arena.commit(A, again, Key(PREFIXES[SMALL], 0, 0, hashes[2]), None)
    storage.arena.abort(A, later.number)
    assert disk.restart().restored == 1
    assert list(disk.space(SMALL).chunks) == [hashes[2]]


def test_of_two_slots_with_one_key_one_is_kept(disk: Disk) -> None:
    hashes = chain(2)
    disk.commit(SMALL, A, disk.reserve(SMALL, 2, A), hashes)
    twin, child = disk.reserve(SMALL, 2, A)
    arena = disk.storage.arena
    arena.commit(A, twin, Key(PREFIXES[SMALL], 0, 0, hashes[0]), None)
    arena.commit(A, child, Key(PREFIXES[SMALL], 0, 0, chain(3)[2]), twin)
    assert disk.restart().restored == 2
    assert list(disk.space(SMALL).chunks) == hashes
    assert disk.storage.arena.usage().committed == 2 * SMALL


def test_what_was_reserved_last_leaves_last_after_a_restart(disk: Disk) -> None:
    chunks = disk.fill(SMALL, 16, "old")
    order = [chunk.hash for chunk in chunks]
    disk.restart()
    for hash_ in order:
        disk.reserve(SMALL, 1, B, [SMALL])
        assert hash_ not in disk.space(SMALL).chunks
    assert len(disk.storage.index) == 0


def test_what_is_stored_after_a_restart_is_younger_than_what_was_before(disk: Disk) -> None:
    disk.fill(SMALL, 12, "before")
    disk.restart()
    after = disk.fill(SMALL, 4, "after")
    disk.reserve(SMALL, 12, B, [SMALL])
    assert all(chunk.stored for chunk in after)


@given(
    st.lists(
        st.tuples(st.sampled_from([SMALL, MIDDLE, BIG]), st.integers(1, 8), st.integers(0, 3)), max_size=12
    )
)
def test_stored_over_restarts_is_what_was_stored(steps: list[tuple[int, int, int]]) -> None:
    disk = Disk(slabs=6)
    for at, (size, count, keep) in enumerate(steps):
        slots = disk.storage.reserve(size, count, A, [SMALL, MIDDLE, BIG])
        if isinstance(slots, Shortage):
            continue
        hashes = chain(count, str(at))
        disk.commit(size, A, slots[keep:], hashes[: len(slots[keep:])])
        disk.storage.abort(A, [(slot.generation, slot.number) for slot in slots[:keep]])
        before = {
            space.prefix: {h: c.ref for h, c in space.chunks.items()} for space in disk.storage.index.spaces
        }
        usage = disk.storage.arena.usage()
        disk.restart()
        after = {
            space.prefix: {h: c.ref for h, c in space.chunks.items()} for space in disk.storage.index.spaces
        }
        assert after == before
        assert disk.storage.arena.usage() == usage
