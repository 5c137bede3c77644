"""The allocator, and the table from which its successor goes on."""

from collections.abc import Callable
from dataclasses import astuple
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_server.arena import NOBODY, Arena, Key, Usage
from cache_server.protocol.keys import SlotRef
from cache_server.protocol.slots import (
    ENTRY_BYTES,
    NO_NUMBER,
    SLAB_POPULATED,
    Geometry,
    SlotState,
    holds,
    read_entry,
    read_slab,
    write_slab,
)
from kit import KIB, SLAB_BYTES, chain, new_file

GEOMETRY = Geometry(4 * SLAB_BYTES, SLAB_BYTES)
SMALL, MIDDLE, ODD = 4 * KIB, 8 * KIB, 12 * KIB  # 4, 2 and, with 4 KiB of waste, 1 to a slab
A, B = b"engine A's owner", b"engine B's owner"
KEYS = [Key(b"a model's prefix", 0, 0, hash_) for hash_ in chain(64)]

Held = dict[int, int]  # slot number -> generation


@pytest.fixture
def file() -> memoryview:
    return new_file(GEOMETRY)


@pytest.fixture
def arena(file: memoryview) -> Arena:
    return Arena(file, GEOMETRY, 1)


def total(usage: Usage) -> int:
    return sum(astuple(usage)) - usage.capacity


# --- reserve, commit, abort, free


def test_what_is_said_of_a_slot_is_in_the_table_first(arena: Arena, file: memoryview) -> None:
    parent, slot = arena.reserve(SMALL, 2, A)
    entry = read_entry(file, GEOMETRY, slot.number)
    assert entry is not None
    assert (entry.state, entry.owner, entry.length) == (SlotState.RESERVED, A, SMALL)
    assert (entry.offset, entry.generation) == (slot.offset, slot.generation)
    arena.commit(A, parent, KEYS[0], None)
    arena.commit(A, slot, KEYS[1], parent)
    assert holds(file, GEOMETRY, slot, KEYS[1].hash)
    entry = read_entry(file, GEOMETRY, slot.number)
    assert entry is not None
    assert (entry.prefix, entry.group, entry.window, entry.hash) == KEYS[1]
    assert (entry.parent_number, entry.parent_generation) == (parent.number, parent.generation)
    first = read_entry(file, GEOMETRY, parent.number)
    assert first is not None
    assert first.parent_number == NO_NUMBER
    arena.free(slot)
    assert not holds(file, GEOMETRY, slot, KEYS[1].hash)
    entry = read_entry(file, GEOMETRY, slot.number)
    assert entry is not None
    assert (entry.state, entry.owner) == (SlotState.FREE, NOBODY)


def test_a_slot_belongs_to_its_reserver_under_one_generation(arena: Arena) -> None:
    (slot,) = arena.reserve(SMALL, 1, A)
    assert arena.owns(A, slot.generation, slot.number)
    assert not arena.owns(B, slot.generation, slot.number)
    assert not arena.owns(A, slot.generation + 1, slot.number)
    with pytest.raises(AssertionError, match="only its reserver"):
        arena.commit(B, slot, KEYS[0], None)
    arena.abort(A, slot.number)
    assert not arena.owns(A, slot.generation, slot.number)
    (again,) = arena.reserve(SMALL, 1, A)
    assert again.number == slot.number
    assert again.generation > slot.generation
    assert not arena.owns(A, slot.generation, slot.number)


def test_the_lowest_numbers_go_out_first_and_the_last_freed_is_next(arena: Arena) -> None:
    slots = arena.reserve(SMALL, 6, A)
    assert [slot.number for slot in slots] == list(range(6))
    arena.abort(A, 2)
    assert arena.reserve(SMALL, 1, A)[0].number == 2


def test_sizes_lie_in_slabs_of_their_own(arena: Arena) -> None:
    slots = [*arena.reserve(SMALL, 5, A), *arena.reserve(MIDDLE, 2, B), *arena.reserve(ODD, 1, A)]
    ends = sorted((slot.offset, slot.offset + arena.slab_of(slot.number).slot_bytes) for slot in slots)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))
    assert ends[0][0] == GEOMETRY.data_at
    assert ends[-1][1] <= GEOMETRY.file_bytes
    assert sorted(arena.slot_sizes) == [SMALL, MIDDLE, ODD]
    assert [len(arena.slabs_of(size)) for size in (SMALL, MIDDLE, ODD)] == [2, 1, 1]
    assert arena.available(SMALL) == 3
    assert arena.available(MIDDLE) == 0
    usage = arena.usage()
    assert (usage.reserved, usage.free, usage.waste) == (5 * SMALL + 2 * MIDDLE + ODD, 3 * SMALL, 4 * KIB)
    assert total(usage) == usage.capacity == 4 * SLAB_BYTES
    assert (arena.reserved_bytes(A), arena.reserved_bytes(B)) == (5 * SMALL + ODD, 2 * MIDDLE)


def test_more_than_there_is_can_not_be_reserved(arena: Arena) -> None:
    with pytest.raises(AssertionError, match="make room"):
        arena.reserve(SMALL, 17, A)
    assert len(arena.reserve(SMALL, 16, A)) == 16
    assert arena.available(SMALL) == arena.available(ODD) == 0


def test_an_empty_slab_takes_another_size(arena: Arena, file: memoryview) -> None:
    slots = arena.reserve(SMALL, 16, A)
    for slot in slots[:4]:
        arena.abort(A, slot.number)
    with pytest.raises(AssertionError, match="in use"):
        arena.uncut(arena.slab_of(slots[4].number))
    arena.uncut(arena.slab_of(slots[0].number))
    assert read_slab(file, GEOMETRY, 0) == SLAB_POPULATED
    assert Arena(memoryview(bytearray(file)), GEOMETRY, 2).available(ODD) == 1
    (big,) = arena.reserve(ODD, 1, A)
    assert big.offset == slots[0].offset
    assert read_slab(file, GEOMETRY, 0) == ODD
    assert not holds(file, GEOMETRY, slots[0], KEYS[0].hash)
    assert total(arena.usage()) == arena.usage().capacity


def test_a_size_without_slabs_is_forgotten(arena: Arena) -> None:
    (slot,) = arena.reserve(ODD, 1, A)
    arena.abort(A, slot.number)
    arena.uncut(arena.slab_of(slot.number))
    assert arena.slot_sizes == []
    assert arena.usage().free == arena.usage().capacity


# --- fresh memory


def test_fresh_memory_is_used_once_it_is_populated() -> None:
    file = new_file(GEOMETRY, populated=False)
    arena = Arena(file, GEOMETRY, 1)
    assert arena.raw_slabs == [0, 1, 2, 3]
    assert arena.populating
    assert arena.available(SMALL) == 0
    assert arena.usage().unpopulated == arena.usage().capacity
    arena.populated(2)
    assert [slot.number for slot in arena.reserve(SMALL, 4, A)] == [8, 9, 10, 11]
    assert arena.available(SMALL) == 0
    assert total(arena.usage()) == arena.usage().capacity
    assert Arena(file, GEOMETRY, 2).raw_slabs == [0, 1, 3]
    arena.population_failed = True
    assert not arena.populating
    arena.population_failed = False
    for slab in (0, 1, 3):
        arena.populated(slab)
    assert not arena.populating


# --- what the next owner finds


def test_reserved_slots_stay_their_owners_over_a_restart(arena: Arena, file: memoryview) -> None:
    (slot,) = arena.reserve(SMALL, 1, A)
    later = Arena(file, GEOMETRY, 2)
    assert later.reserved == {A: {slot.number: slot.generation}}
    assert slot.number not in [other.number for other in later.reserve(SMALL, 15, B)]
    later.commit(A, slot, KEYS[0], None)
    assert holds(file, GEOMETRY, slot, KEYS[0].hash)
    assert later.offset(slot.number) == slot.offset


def test_committed_slots_are_inherited_with_key_and_parent(arena: Arena, file: memoryview) -> None:
    parent, child = arena.reserve(MIDDLE, 2, A)
    arena.commit(A, parent, KEYS[0], None)
    arena.commit(A, child, KEYS[1], parent)
    later = Arena(file, GEOMETRY, 2)
    entries = dict(later.inherited)
    assert entries[parent.number].hash == KEYS[0].hash
    assert (entries[child.number].hash, entries[child.number].parent_number) == (KEYS[1].hash, parent.number)
    assert later.usage() == arena.usage()


def test_no_generation_is_given_out_twice_over_any_number_of_boots(file: memoryview) -> None:
    seen: set[int] = set()
    for boots in range(1, 6):
        arena = Arena(file, GEOMETRY, boots)
        for _ in range(boots * 7):
            (slot,) = arena.reserve(SMALL, 1, A)
            assert slot.generation not in seen
            assert slot.generation > max(seen, default=0)
            seen.add(slot.generation)
            arena.abort(A, slot.number)


def test_entries_of_an_earlier_cut_mean_nothing(arena: Arena, file: memoryview) -> None:
    slots = arena.reserve(SMALL, 4, A)
    for slot, key in zip(slots, KEYS, strict=False):
        arena.commit(A, slot, key, None)
    write_slab(file, GEOMETRY, 0, MIDDLE)  # as if the slab had got another size with its entries still there
    later = Arena(file, GEOMETRY, 2)
    assert later.inherited == []
    assert len(later.slabs_of(MIDDLE)[0].free) == 2
    assert total(later.usage()) == later.usage().capacity


BEFORE = {
    "commit": SlotState.RESERVED,
    "abort": SlotState.RESERVED,
    "free": SlotState.COMMITTED,
    "reserve": SlotState.FREE,
}


@pytest.mark.parametrize("keep", [0, 1, 40, 64, 127])
@pytest.mark.parametrize("act", BEFORE)
def test_an_entry_torn_by_a_kill_is_old_new_or_free(act: str, keep: int, file: memoryview) -> None:
    arena = Arena(file, GEOMETRY, 1)
    neighbour, slot = arena.reserve(SMALL, 2, A)
    arena.commit(A, neighbour, KEYS[0], None)
    if act == "free":
        arena.commit(A, slot, KEYS[1], None)
    if act == "reserve":
        arena.abort(A, slot.number)
    at = GEOMETRY.entry_at(slot.number)
    before = bytes(file[at : at + ENTRY_BYTES])
    acts: dict[str, Callable[[], object]] = {
        "commit": lambda: arena.commit(A, slot, KEYS[1], neighbour),
        "abort": lambda: arena.abort(A, slot.number),
        "free": lambda: arena.free(slot),
        "reserve": lambda: arena.reserve(SMALL, 1, B),
    }
    acts[act]()
    file[at + keep : at + ENTRY_BYTES] = before[keep:]  # only its first bytes had been written
    later = Arena(file, GEOMETRY, 2)
    entry = read_entry(file, GEOMETRY, slot.number)
    if keep == 0:
        assert entry is not None
        assert entry.state == BEFORE[act]
    else:
        assert entry is not None
        assert entry.state == SlotState.FREE
        assert later.available(SMALL) == 15
        assert later.reserved == {}
    assert [number for number, _ in later.inherited][:1] == [neighbour.number]
    assert total(later.usage()) == later.usage().capacity


def test_tears_do_not_add_up(arena: Arena, file: memoryview) -> None:
    """Two servers are killed one byte into the same entry: what the first one ended does not come back."""
    (slot,) = arena.reserve(SMALL, 1, A)
    at = GEOMETRY.entry_at(slot.number)

    def tear(act: Callable[[], object]) -> None:
        before = bytes(file[at : at + ENTRY_BYTES])
        act()
        file[at + 1 : at + ENTRY_BYTES] = before[1:]

    tear(lambda: arena.abort(A, slot.number))
    second = Arena(file, GEOMETRY, 2)
    assert second.reserved == {}
    tear(lambda: second.reserve(SMALL, 1, B))
    assert Arena(file, GEOMETRY, 3).reserved == {}


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["reserve", "commit", "abort", "free", "uncut", "restart"]),
        st.sampled_from([SMALL, MIDDLE, ODD]),
        st.integers(0, 63),
    ),
    max_size=40,
)


@given(STEPS)
def test_table_and_memory_agree_at_every_point(steps: list[tuple[str, int, int]]) -> None:
    file = new_file(GEOMETRY)
    arena = Arena(file, GEOMETRY, 1)
    reserved: dict[SlotRef, bytes] = {}
    committed: dict[SlotRef, bytes] = {}
    boots = 1
    for act, size, pick in steps:
        if act == "reserve" and (room := arena.available(size)):
            owner = (A, B)[pick % 2]
            reserved |= dict.fromkeys(arena.reserve(size, 1 + pick % room, owner), owner)
        elif act in ("commit", "abort") and reserved:
            slot = list(reserved)[pick % len(reserved)]
            owner = reserved.pop(slot)
            if act == "commit":
                arena.commit(owner, slot, KEYS[pick], None)
                committed[slot] = KEYS[pick].hash
            else:
                arena.abort(owner, slot.number)
        elif act == "free" and committed:
            slot = list(committed)[pick % len(committed)]
            del committed[slot]
            arena.free(slot)
        elif act == "uncut":
            for slab in [slab for each in arena.slot_sizes for slab in arena.slabs_of(each) if not slab.used]:
                arena.uncut(slab)
        elif act == "restart":
            boots += 1
            arena = Arena(file, GEOMETRY, boots)
        check(arena, reserved, committed)
        successor = Arena(memoryview(bytearray(file)), GEOMETRY, boots + 1)
        check(successor, reserved, committed)
        inherited = {(number, entry.generation, entry.hash) for number, entry in successor.inherited}
        assert inherited == {(slot.number, slot.generation, hash_) for slot, hash_ in committed.items()}


def check(arena: Arena, reserved: dict[SlotRef, bytes], committed: dict[SlotRef, bytes]) -> None:
    owned: dict[bytes, Held] = {}
    for slot, owner in reserved.items():
        owned.setdefault(owner, {})[slot.number] = slot.generation
    assert arena.reserved == owned
    slots = [*reserved, *committed]
    regions = sorted((slot.offset, arena.slab_of(slot.number).slot_bytes) for slot in slots)
    assert all(at + size <= after for (at, size), (after, _) in pairwise(regions))
    assert all(arena.offset(slot.number) == slot.offset for slot in slots)
    usage = arena.usage()
    assert total(usage) == usage.capacity
    assert usage.committed == sum(arena.slab_of(slot.number).slot_bytes for slot in committed)
    assert usage.reserved == sum(arena.slab_of(slot.number).slot_bytes for slot in reserved)
    assert usage.unpopulated == 0


def test_every_committed_slot_is_inherited(arena: Arena, file: memoryview) -> None:
    slots = arena.reserve(SMALL, 16, A)
    for slot, key in zip(slots, KEYS, strict=False):
        arena.commit(A, slot, key, None)
    inherited = Arena(file, GEOMETRY, 2).inherited
    assert [(number, entry.hash, entry.generation) for number, entry in inherited] == [
        (slot.number, key.hash, slot.generation) for slot, key in zip(slots, KEYS, strict=False)
    ]
