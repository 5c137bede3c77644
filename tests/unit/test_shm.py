"""The arena file: made, taken over or replaced, and populated."""

import dataclasses
import fcntl
import logging
import mmap
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cache_server import shm
from cache_server.arena import Key
from cache_server.beats import Bounds, Part
from cache_server.faults import Faults
from cache_server.protocol.slots import (
    FORMAT_VERSION,
    SLAB_POPULATED,
    SLAB_RAW,
    FormatError,
    Geometry,
    clear_tables,
    holds,
    read_boots,
    read_header,
    read_slab,
    write_slab,
)
from cache_server.shm import BLOCK_BYTES, ArenaError, ArenaFile, Populator, free_pages, open_arena
from processes import short_dir

MIB = 1 << 20
CAPACITY = 16 * MIB
GEOMETRY = Geometry.of(CAPACITY)
OWNER = b"an engine's mark"
KEY = Key(b"a model's prefix", 0, 0, bytes(range(32)))
DEADLINE_S = 20.0

Spoil = Callable[[Path], object]


@pytest.fixture
def path() -> Iterator[Path]:
    with short_dir() as directory:
        yield directory / "arena"


def make(path: Path, capacity: int = CAPACITY) -> ArenaFile:
    file = open_arena(path, capacity, 0o600)
    file.arena(1, 0)
    return file


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s
        os.sched_yield()


def content(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as opened:
        opened.seek(offset)
        return opened.read(length)


# --- made and taken over


def test_a_fresh_arena_has_all_its_size_and_no_memory_yet(path: Path) -> None:
    file = open_arena(path, CAPACITY, 0o600)
    stat = path.stat()
    assert stat.st_size == file.geometry.file_bytes == GEOMETRY.file_bytes
    assert stat.st_mode & 0o777 == 0o600
    assert GEOMETRY.table_at <= stat.st_blocks * BLOCK_BYTES < MIB  # what is written at once, and no more
    assert read_header(file.table) == (GEOMETRY, file.id)
    arena = file.arena(7, 9)
    assert arena.raw_slabs == list(range(8))
    assert read_boots(file.table) == (1, [(7, 9)])
    assert [entry.name for entry in path.parent.iterdir()] == ["arena"]
    assert file.in_place
    file.close()


def test_an_arena_is_taken_over_with_all_that_is_in_it(path: Path) -> None:
    first = open_arena(path, CAPACITY, 0o600)
    arena = first.arena(1, 0)
    arena.populated(3)
    (slot,) = arena.reserve(4096, 1, OWNER)
    os.pwrite(first.fd, b"what was stored", slot.offset)
    first.close()
    second = open_arena(path, CAPACITY, 0o600)
    assert second.id == first.id
    taken = second.arena(2, 0)
    assert taken.reserved == {OWNER: {slot.number: slot.generation}}
    assert taken.raw_slabs == [0, 1, 2, 4, 5, 6, 7]
    assert read_boots(second.table)[0] == 2
    assert content(path, slot.offset, 15) == b"what was stored"
    assert taken.reserve(4096, 1, OWNER)[0].generation > slot.generation
    second.close()


def spoil_version(path: Path) -> None:
    with path.open("r+b") as opened:
        header = bytearray(opened.read(52))
        struct.pack_into("<I", header, 8, FORMAT_VERSION + 1)
        struct.pack_into("<I", header, 48, zlib.crc32(header[:48]))
        opened.seek(0)
        opened.write(header)


def give_up(path: Path) -> None:
    """The process is killed before it has removed the name."""
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as mapped, memoryview(mapped) as table:
        clear_tables(table, GEOMETRY)


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (give_up, "format version 0"),
        (lambda path: path.write_bytes(b""), "the file has 0 bytes"),
        (lambda path: os.truncate(path, 8192), "now"),
        (lambda path: os.truncate(path, GEOMETRY.file_bytes - 1), "now"),
        (lambda path: os.truncate(path, GEOMETRY.file_bytes + 4096), "now"),
        (spoil_version, f"format version {FORMAT_VERSION + 1}"),
    ],
    ids=["half given up", "empty", "cut off", "a byte too few", "too long", "another version"],
)
def test_what_is_no_arena_of_ours_is_replaced_and_that_is_said(
    path: Path, spoil: Spoil, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    old = make(path)
    old.close()
    spoil(path)
    new = open_arena(path, CAPACITY, 0o600)
    assert new.id != old.id
    assert path.stat().st_size == GEOMETRY.file_bytes
    assert new.arena(1, 0).reserved == {}
    assert why in caplog.text
    assert "starts empty" in caplog.text
    assert new.in_place
    new.close()


@pytest.mark.parametrize("text", [b"no arena at all" * 1000, b"short"])
def test_somebody_elses_file_is_kept(path: Path, text: bytes) -> None:
    path.write_bytes(text)
    with pytest.raises(ArenaError, match="the file is no arena and is kept: remove it, or choose another"):
        open_arena(path, CAPACITY, 0o600)
    assert path.read_bytes() == text


def test_after_a_boot_of_the_machine_nothing_is_believed(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk a table may have been written whose data was not."""
    old = make(path)
    old.close()
    (tmp_path / "boot_id").write_text("another boot's\n")
    monkeypatch.setattr(shm, "MACHINE_BOOT", tmp_path / "boot_id")
    new = open_arena(path, CAPACITY, 0o600)
    assert "it is of another boot of this machine" in caplog.text
    new.close()
    again = open_arena(path, CAPACITY, 0o600)
    assert again.id == new.id
    again.close()


def test_another_capacity_starts_a_fresh_arena(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = make(path)
    old.close()
    new = open_arena(path, 2 * CAPACITY, 0o600)
    assert new.id != old.id
    assert new.geometry == Geometry.of(2 * CAPACITY)
    assert f"made for {CAPACITY} bytes, now {2 * CAPACITY}" in caplog.text
    new.close()


def test_a_capacity_is_rounded_up_to_whole_slabs_and_then_the_same(path: Path) -> None:
    first = make(path, CAPACITY - 5)
    first.close()
    second = make(path, CAPACITY)
    assert second.id == first.id
    second.close()


def test_what_a_killed_server_had_not_finished_is_overwritten(path: Path) -> None:
    unfinished = path.with_name("arena.new")
    unfinished.write_bytes(b"half an arena" * 1000)
    file = make(path)
    assert read_header(file.table)[0] == GEOMETRY
    assert file.arena(1, 0).raw_slabs == list(range(8))
    assert not unfinished.exists()
    file.close()


def test_a_file_that_was_removed_or_replaced_is_not_in_place(path: Path) -> None:
    file = make(path)
    path.unlink()
    assert not file.in_place
    path.write_bytes(b"another")
    assert not file.in_place
    file.close()


# --- given up


class Engine:
    """Maps the arena for as long as it knows no other, and was told of one chunk."""

    def __init__(self, file: ArenaFile) -> None:
        self.fd = os.open(file.path, os.O_RDWR)
        self.map = mmap.mmap(self.fd, GEOMETRY.file_bytes)
        arena = file.arena(1, 0)
        for slab in (2, 3):
            arena.populated(slab)
        (self.slot,) = arena.reserve(4096, 1, OWNER)
        self.map[self.slot.offset] = 7
        arena.commit(OWNER, self.slot, KEY, None)

    @property
    def memory_bytes(self) -> int:
        return os.fstat(self.fd).st_blocks * BLOCK_BYTES

    @property
    def may_use_what_it_has_read(self) -> bool:
        return holds(memoryview(self.map), GEOMETRY, self.slot, KEY.hash)

    def close(self) -> None:
        os.close(self.fd)


@pytest.fixture
def used(path: Path) -> Iterator[tuple[ArenaFile, Engine]]:
    file = make(path)
    populate(file, [2, 3])
    engine = Engine(file)
    assert engine.may_use_what_it_has_read
    yield file, engine
    engine.close()


def assert_given_up(engine: Engine) -> None:
    """Its data's memory is free; what it looks at is there still, and says that it has nothing."""
    tables = GEOMETRY.table_at + 2 * GEOMETRY.entries_bytes
    assert tables <= engine.memory_bytes < tables + MIB
    assert not engine.may_use_what_it_has_read
    assert engine.memory_bytes < tables + MIB
    with pytest.raises(FormatError):
        read_header(memoryview(engine.map))
    assert engine.map[engine.slot.offset] == 0


def test_a_file_without_a_name_gives_its_memory_back_though_engines_map_it(
    used: tuple[ArenaFile, Engine],
) -> None:
    file, engine = used
    file.path.unlink()
    file.close()
    assert_given_up(engine)


def test_a_file_with_a_name_keeps_its_memory(used: tuple[ArenaFile, Engine]) -> None:
    file, engine = used
    file.close()
    assert engine.may_use_what_it_has_read
    assert engine.map[engine.slot.offset] == 7


def test_its_server_lets_go_of_it_whoever_still_knows_its_table(path: Path) -> None:
    file = make(path)
    arena = file.arena(2, 0)
    file.close()
    assert file.map.closed
    assert arena.usage().capacity == CAPACITY


def test_pages_are_freed_before_the_name_is_removed(used: tuple[ArenaFile, Engine]) -> None:
    file, engine = used
    file.close()
    free_pages(engine.fd)
    assert_given_up(engine)


def test_what_a_new_format_or_capacity_replaces_is_freed(used: tuple[ArenaFile, Engine]) -> None:
    file, engine = used
    file.close()
    spoil_version(file.path)
    open_arena(file.path, 2 * CAPACITY, 0o600).close()
    assert_given_up(engine)


@pytest.mark.parametrize("content", [b"", b"no arena at all"])
def test_what_is_no_arena_is_left_as_it_is(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with path.open("r+b") as file:
        free_pages(file.fileno())
    assert path.read_bytes() == content


def test_an_arena_that_was_cut_off_is_left_as_it_is(path: Path) -> None:
    """Behind its end there is nothing to clear or to look at."""
    make(path).close()
    os.truncate(path, GEOMETRY.table_at)
    with path.open("r+b") as file:
        free_pages(file.fileno())
    assert read_header(content(path, 0, 4096))[0] == GEOMETRY


# --- refused


def test_too_little_memory_is_refused_before_the_old_arena_is_lost(path: Path) -> None:
    first = make(path)
    fcntl.flock(first.fd, fcntl.LOCK_UN)  # its server has ended
    with pytest.raises(
        ArenaError, match=r"MiB more are to be filled, but .* has .* MiB free: lower --capacity"
    ):
        open_arena(path, 1 << 50, 0o600)
    assert first.in_place
    again = make(path)
    assert again.id == first.id
    first.close()
    again.close()


def test_too_little_memory_leaves_nothing_behind(path: Path) -> None:
    with pytest.raises(ArenaError, match="lower --capacity or free memory"):
        open_arena(path, 1 << 50, 0o600)
    assert list(path.parent.iterdir()) == []


def test_what_can_not_be_opened_is_named(path: Path) -> None:
    path.mkdir()
    with pytest.raises(ArenaError, match=rf"arena {path}: Is a directory: check"):
        open_arena(path, CAPACITY, 0o600)


def test_what_can_not_be_made_is_named(path: Path) -> None:
    path.with_name("arena.new").mkdir()
    with pytest.raises(ArenaError, match=rf"arena {path}: can't make a file of {GEOMETRY.file_bytes} bytes"):
        open_arena(path, CAPACITY, 0o600)


# --- populated


def populator_of(file: ArenaFile, slabs: list[int]) -> Populator:
    return Populator(
        file, slabs, Part("populate", Bounds(1_000, 1_000), critical=False), Faults(file.path.parent)
    )


def populate(file: ArenaFile, slabs: list[int]) -> None:
    populator = populator_of(file, slabs)
    populator.start()
    finished: list[int] = []
    wait_for(lambda: finished.extend(populator.take_finished()) or len(finished) == len(slabs))
    assert finished == slabs
    assert populator.take_finished() == []
    assert populator.failure == ""
    populator.stop()


def test_populating_gives_every_page_its_memory(path: Path) -> None:
    file = make(path)
    populate(file, list(range(8)))
    assert path.stat().st_blocks * BLOCK_BYTES >= CAPACITY + 8 * GEOMETRY.entries_bytes
    assert not any(content(path, GEOMETRY.data_at, CAPACITY))
    assert path.stat().st_size == GEOMETRY.file_bytes
    file.close()


def test_only_the_slabs_that_were_named_are_touched(path: Path) -> None:
    file = make(path)
    marks = {slab: (b"bytes of slab %d." % slab) * (GEOMETRY.slab_bytes // 16) for slab in (0, 2, 7)}
    for slab, mark in marks.items():
        os.pwrite(file.fd, mark, GEOMETRY.slab_at(slab))
    before = path.stat().st_blocks * BLOCK_BYTES
    populate(file, [1, 3])
    for slab, mark in marks.items():
        assert content(path, GEOMETRY.slab_at(slab), GEOMETRY.slab_bytes) == mark
    assert path.stat().st_blocks * BLOCK_BYTES - before == 2 * (GEOMETRY.slab_bytes + GEOMETRY.entries_bytes)
    file.close()


def test_a_new_server_populates_what_the_last_one_had_not(path: Path) -> None:
    file = make(path)
    for slab in (0, 4):
        write_slab(file.table, GEOMETRY, slab, SLAB_POPULATED)
    write_slab(file.table, GEOMETRY, 5, 4096)
    file.close()
    later = open_arena(path, CAPACITY, 0o600)
    arena = later.arena(2, 0)
    raw = arena.raw_slabs
    assert raw == [1, 2, 3, 6, 7]
    populate(later, raw)
    table = later.table
    assert [read_slab(table, GEOMETRY, slab) for slab in (1, 6)] == [SLAB_RAW] * 2
    for slab in raw:
        arena.populated(slab)
    assert [read_slab(table, GEOMETRY, slab) for slab in (1, 5, 6)] == [SLAB_POPULATED, 4096, SLAB_POPULATED]
    later.close()


def test_failing_memory_is_said_and_does_not_stop_the_server(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = make(path)
    closed = os.open(path, os.O_RDONLY)  # nothing can be written through it
    populator = populator_of(dataclasses.replace(file, fd=closed), [0, 1])
    populator.start()
    wait_for(lambda: populator.failure != "")
    assert populator.take_finished() == []
    populator.stop()  # at once, though it would try again later
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "populating stopped" in caplog.text
    os.close(closed)
    file.close()


def test_a_populator_that_never_started_can_be_stopped(path: Path) -> None:
    file = make(path)
    populator_of(file, [0]).stop()
    file.close()


def test_a_stopped_populator_names_no_slab_that_it_has_not_finished(path: Path) -> None:
    file = make(path)
    populator = populator_of(file, list(range(8)))
    populator.start()
    populator.stop()
    finished = populator.take_finished()
    assert path.stat().st_blocks * BLOCK_BYTES >= len(finished) * GEOMETRY.slab_bytes
    assert finished == list(range(len(finished)))
    file.close()
