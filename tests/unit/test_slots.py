"""The arena file's format: geometry, header, boots, entries, and what a reader believes."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_server.protocol import slots
from cache_server.protocol.keys import SlotRef
from cache_server.protocol.slots import (
    DATA_ALIGN,
    ENTRY_BYTES,
    FORMAT_VERSION,
    HISTORY,
    MAGIC,
    NO_NUMBER,
    SLAB_BYTES_MAX,
    SLAB_RAW,
    SLOT_ALIGN,
    Entry,
    FormatError,
    Geometry,
    SlotState,
    clear_tables,
    holds,
    read_boots,
    read_entry,
    read_header,
    read_slab,
    record_boot,
    write_entry,
    write_header,
    write_slab,
)
from kit import ARENA_ID, SLAB_BYTES, new_file

SMALL = Geometry(4 * SLAB_BYTES, SLAB_BYTES)
MIB = 1 << 20
ENTRY = Entry(
    SlotState.COMMITTED, 1, 2, 3, 4, 5, 6, 4096, b"the owner's mark", b"a model's prefix", bytes(range(32))
)


@pytest.fixture
def file() -> memoryview:
    return new_file(SMALL)


# --- geometry


@pytest.mark.parametrize(
    ("capacity", "slab", "slabs"),
    [
        (16 * MIB, 2 * MIB, 8),
        (16 * MIB + 1, 2 * MIB, 9),
        (64 * MIB, 2 * MIB, 32),
        (8 << 30, 256 * MIB, 32),
        (32 << 30, 1 << 30, 32),
        (64 << 40, 1 << 30, 65_536),
    ],
)
def test_slabs_are_a_32nd_within_bounds(capacity: int, slab: int, slabs: int) -> None:
    geometry = Geometry.of(capacity)
    assert (geometry.slab_bytes, geometry.slabs) == (slab, slabs)


@given(st.integers(16 * MIB, 64 << 40))
def test_nothing_in_the_file_overlaps(capacity: int) -> None:
    geometry = Geometry.of(capacity)
    last_slab = geometry.slabs - 1
    last_entry = geometry.slabs * geometry.entries_per_slab - 1
    assert geometry.capacity_bytes >= capacity
    assert geometry.capacity_bytes - capacity < geometry.slab_bytes <= SLAB_BYTES_MAX
    assert geometry.slabs * geometry.slab_bytes == geometry.capacity_bytes
    assert slots.BOOTS_AT + 8 + 16 * HISTORY <= slots.SLABS_AT
    assert geometry.slab_record_at(last_slab) + 8 <= geometry.table_at
    assert geometry.entry_at(last_entry) + ENTRY_BYTES <= geometry.data_at
    assert geometry.slab_at(last_slab) + geometry.slab_bytes == geometry.file_bytes
    assert geometry.data_at % DATA_ALIGN == geometry.slab_bytes % SLOT_ALIGN == 0


# --- header


def test_a_header_comes_back_as_it_was(file: memoryview) -> None:
    assert read_header(file) == (SMALL, ARENA_ID)
    assert read_header(bytes(file[:4096])) == (SMALL, ARENA_ID)


@pytest.mark.parametrize(
    ("at", "why"),
    [(0, "begins with"), (8, "format version"), (20, "check word"), (40, "check word"), (48, "check word")],
)
def test_a_changed_header_is_refused_with_its_reason(file: memoryview, at: int, why: str) -> None:
    file[at] ^= 1
    with pytest.raises(FormatError, match=why):
        read_header(file)


def test_what_is_no_header_is_refused() -> None:
    with pytest.raises(FormatError, match="0 bytes, too few"):
        read_header(b"")
    with pytest.raises(FormatError, match="begins with"):
        read_header(bytes(4096))


def test_another_version_is_refused_even_if_whole(file: memoryview) -> None:
    write_header(file, SMALL, ARENA_ID)
    struct.pack_into("<I", file, 8, FORMAT_VERSION + 1)
    struct.pack_into("<I", file, 48, zlib.crc32(file[:48]))
    with pytest.raises(FormatError, match=f"format version {FORMAT_VERSION + 1}, this code"):
        read_header(file)
    assert read_header(file, any_version=True) == (SMALL, ARENA_ID)


# --- boots and slabs


def test_boots_are_counted_and_the_last_ones_remembered(file: memoryview) -> None:
    assert read_boots(file) == (0, [])
    for boot in range(1, HISTORY + 4):
        assert record_boot(file, 100 + boot, 1_000 + boot) == boot
    boots, last = read_boots(file)
    assert boots == HISTORY + 3
    assert last == [(100 + boot, 1_000 + boot) for boot in range(4, HISTORY + 4)]
    assert read_header(file) == (SMALL, ARENA_ID)


def test_slab_records_are_apart(file: memoryview) -> None:
    for slab in range(SMALL.slabs):
        write_slab(file, SMALL, slab, 4096 * (slab + 1))
    assert [read_slab(file, SMALL, slab) for slab in range(SMALL.slabs)] == [4096, 8192, 12288, 16384]


def test_a_cleared_file_is_no_arena_and_holds_nothing(file: memoryview) -> None:
    unused = SMALL.entries_per_slab * (SMALL.slabs - 1)  # the first of a slab that has no memory
    write_slab(file, SMALL, SMALL.slabs - 1, SLAB_RAW)
    for number in (0, unused - 1, unused):
        write_entry(file, SMALL, number, ENTRY)
    clear_tables(file, SMALL)
    assert bytes(file[: SMALL.entry_at(unused)]).rstrip(b"\0") == MAGIC, "and is not somebody else's file"
    assert read_entry(file, SMALL, unused) == ENTRY, "a page without memory is not to be written to"
    with pytest.raises(FormatError, match="format version 0"):
        read_header(file)


# --- entries


def test_an_entry_comes_back_as_it_was(file: memoryview) -> None:
    write_entry(file, SMALL, 3, ENTRY)
    assert read_entry(file, SMALL, 3) == ENTRY
    assert read_entry(file, SMALL, 2) is None
    assert read_entry(file, SMALL, 4) is None


@given(st.integers(0, ENTRY_BYTES - 1), st.integers(1, 255))
def test_a_changed_byte_is_noticed(at: int, change: int) -> None:
    table = memoryview(bytearray(SMALL.data_at))
    write_entry(table, SMALL, 0, ENTRY)
    table[SMALL.entry_at(0) + at] ^= change
    assert read_entry(table, SMALL, 0) is None


@given(st.integers(1, ENTRY_BYTES - 1))
def test_an_entry_half_written_over_another_is_noticed(written: int) -> None:
    table = memoryview(bytearray(SMALL.data_at))
    write_entry(table, SMALL, 0, ENTRY)
    new = bytes(table[SMALL.entry_at(0) : SMALL.entry_at(1)])
    old = ENTRY._replace(
        state=SlotState.RESERVED, generation=99, hash=bytes(32), prefix=bytes(16), parent_number=NO_NUMBER
    )
    write_entry(table, SMALL, 0, old)
    table[SMALL.entry_at(0) : SMALL.entry_at(0) + written] = new[:written]
    assert read_entry(table, SMALL, 0) in (None, old, ENTRY)
    if written < ENTRY_BYTES - 4:
        assert read_entry(table, SMALL, 0) is None


def test_an_entry_belongs_to_its_number(file: memoryview) -> None:
    write_entry(file, SMALL, 0, ENTRY)
    file[SMALL.entry_at(1) : SMALL.entry_at(2)] = bytes(file[SMALL.entry_at(0) : SMALL.entry_at(1)])
    assert read_entry(file, SMALL, 0) == ENTRY
    assert read_entry(file, SMALL, 1) is None


# --- what a reader believes


@pytest.mark.parametrize(
    ("changes", "believed"),
    [
        ({}, True),
        ({"state": SlotState.RESERVED}, False),
        ({"state": SlotState.FREE}, False),
        ({"generation": 6}, False),
        ({"offset": 4096}, False),
        ({"hash": bytes(32)}, False),
    ],
)
def test_a_reader_believes_a_committed_slot_of_that_generation(
    file: memoryview, changes: dict[str, object], believed: bool
) -> None:
    write_entry(file, SMALL, 2, ENTRY._replace(**changes))
    assert holds(file, SMALL, SlotRef(ENTRY.offset, ENTRY.generation, 2), ENTRY.hash) is believed


def test_a_reader_believes_no_torn_or_unused_slot(file: memoryview) -> None:
    ref = SlotRef(ENTRY.offset, ENTRY.generation, 2)
    assert not holds(file, SMALL, ref, ENTRY.hash)
    write_entry(file, SMALL, 2, ENTRY)
    file[SMALL.entry_at(2) + 100] ^= 1
    assert not holds(file, SMALL, ref, ENTRY.hash)
