"""Mappings made fast piece by piece, with the driver's calls written down."""

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest

from cache_server.protocol.slots import SLAB_POPULATED, SLAB_RAW, write_slab
from lmconnector.arena import ArenaMap
from lmconnector.transfer import attaching
from lmconnector.transfer.attaching import Attachments
from paged import GEOMETRY, MIB, mapped_arena

PIECE_BYTES = 4 * MIB
SLABS_PER_PIECE = PIECE_BYTES // GEOMETRY.slab_bytes


class Driver:
    done = "pinned"
    advice = "ask somebody"

    def __init__(self) -> None:
        self.prepared: dict[int, int] = {}
        self.failing: dict[int, int] = {}  # an address -> the error
        self.before: Callable[[int], object] = lambda address: None

    def prepare(self, address: int, size_bytes: int) -> int:
        self.before(address)
        code = self.failing.get(address, 0)
        if code == 0:
            self.prepared[address] = size_bytes
        return code

    def forget(self, address: int) -> int:
        code = self.failing.get(address, 0)
        if code == 0:
            del self.prepared[address]
        return code

    def explain(self, code: int) -> str:
        return {2: "out of memory"}[code]


@pytest.fixture(autouse=True)
def small_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attaching, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(attaching, "REST", 0.0)
    monkeypatch.setattr(attaching, "POLL_S", 0.001)


@pytest.fixture
def arena() -> Iterator[ArenaMap]:
    with mapped_arena() as mapped:
        yield mapped


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def attachments(driver: Driver) -> Attachments:
    return Attachments(driver)


def start_of(arena: ArenaMap) -> int:
    return arena.data.data_ptr()


def pieces_of(arena: ArenaMap) -> list[int]:
    """Where they begin."""
    start = start_of(arena)
    first = start // PIECE_BYTES + 1
    return [start, *range(first * PIECE_BYTES, start + GEOMETRY.capacity_bytes, PIECE_BYTES)]


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_all_slots_of_an_arena_are_prepared_in_pieces_between_borders(
    driver: Driver, attachments: Attachments, arena: ArenaMap, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    attachments.attach(arena)
    assert list(driver.prepared) == pieces_of(arena)
    assert sum(driver.prepared.values()) == GEOMETRY.capacity_bytes
    assert max(driver.prepared.values()) == PIECE_BYTES
    assert "arena: 16 MiB pinned in" in caplog.text
    assert warnings(caplog) == []


def test_detach_lets_just_that_mapping_go(driver: Driver, attachments: Attachments, arena: ArenaMap) -> None:
    with mapped_arena() as other:
        attachments.attach(arena)
        attachments.attach(other)
        for _ in range(2):
            attachments.detach(arena, nullcontext)
            assert list(driver.prepared) == pieces_of(other)


def test_a_refusal_is_one_warning_and_the_pieces_before_it_stay(
    driver: Driver, attachments: Attachments, arena: ArenaMap, caplog: pytest.LogCaptureFixture
) -> None:
    refused = pieces_of(arena)[2]
    driver.failing[refused] = 2
    attachments.attach(arena)
    assert list(driver.prepared) == pieces_of(arena)[:2]
    assert warnings(caplog) == [
        f"arena: {(refused - start_of(arena)) // MIB} of 16 MiB pinned, then error 2 (out of memory): "
        "copies of the rest are slower; ask somebody"
    ]
    attachments.detach(arena, nullcontext)
    assert driver.prepared == {}
    assert len(warnings(caplog)) == 1


def test_no_copy_is_under_way_while_a_piece_is_let_go(
    driver: Driver, attachments: Attachments, arena: ArenaMap
) -> None:
    let_go: list[int] = []

    @contextmanager
    def quiet() -> Iterator[None]:
        before = len(driver.prepared)
        yield
        let_go.append(before - len(driver.prepared))

    attachments.attach(arena)
    attachments.detach(arena, quiet)
    assert let_go == [1] * len(pieces_of(arena))


def test_a_piece_that_can_not_be_let_go_keeps_no_other(
    driver: Driver, attachments: Attachments, arena: ArenaMap, caplog: pytest.LogCaptureFixture
) -> None:
    attachments.attach(arena)
    stuck = pieces_of(arena)[1]
    driver.failing[stuck] = 2
    attachments.detach(arena, nullcontext)
    assert list(driver.prepared) == [stuck]
    assert warnings(caplog) == ["arena: can't be let go: error 2 (out of memory)"]


# --- memory that the server has yet to populate


def test_a_piece_is_prepared_when_the_server_has_populated_it(
    driver: Driver, attachments: Attachments
) -> None:
    with mapped_arena(populated=0) as arena:
        for slab in range(GEOMETRY.slabs):
            begin, end = slab * GEOMETRY.slab_bytes, (slab + 1) * GEOMETRY.slab_bytes
            assert not arena.populated(begin, end)
        seen: list[bool] = []
        driver.before = lambda at: seen.append(
            arena.populated(at - start_of(arena), min(at - start_of(arena) + 1, GEOMETRY.capacity_bytes))
        )
        thread = threading.Thread(target=attachments.attach, args=(arena,))
        thread.start()
        for slab in range(GEOMETRY.slabs):
            write_slab(arena._view, GEOMETRY, slab, SLAB_POPULATED)
        thread.join()
        assert seen == [True] * len(pieces_of(arena))
        assert list(driver.prepared) == pieces_of(arena)


def test_a_piece_over_two_slabs_needs_both() -> None:
    with mapped_arena(populated=1) as arena:
        size = GEOMETRY.slab_bytes
        assert arena.populated(0, size)
        assert not arena.populated(0, size + 1)
        assert not arena.populated(size - 1, size + 1)
        write_slab(arena._view, GEOMETRY, 1, SLAB_POPULATED + 4096)
        assert arena.populated(size - 1, 2 * size)
        write_slab(arena._view, GEOMETRY, 0, SLAB_RAW)
        assert arena.populated(size, 2 * size)


def test_a_server_that_populates_nothing_more_is_given_up(
    driver: Driver,
    attachments: Attachments,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(attaching, "PATIENCE_S", 0.01)
    with mapped_arena(populated=GEOMETRY.slabs - 1) as arena:
        attachments.attach(arena)
        populated_end = start_of(arena) + GEOMETRY.capacity_bytes - GEOMETRY.slab_bytes
        ends = [*pieces_of(arena)[1:], start_of(arena) + GEOMETRY.capacity_bytes]
        whole = [at for at, end in zip(pieces_of(arena), ends, strict=True) if end <= populated_end]
        assert list(driver.prepared) == whole
        assert "MiB pinned; the server has not populated the rest" in caplog.text
        assert " in 0.0 s" not in caplog.text
        attachments.detach(arena, nullcontext)
        assert driver.prepared == {}


# --- while another thread attaches


@pytest.mark.parametrize("how", ["detach", "close"])
@pytest.mark.parametrize("piece", range(4))
def test_what_is_detached_meanwhile_leaves_nothing(
    driver: Driver, attachments: Attachments, arena: ArenaMap, how: str, piece: int
) -> None:
    """The driver is just at work on a piece."""
    at_work, go_on = threading.Event(), threading.Event()

    def before(address: int) -> None:
        if address == pieces_of(arena)[piece]:
            at_work.set()
            go_on.wait()

    driver.before = before
    attach = threading.Thread(target=attachments.attach, args=(arena,))
    drop = {
        "detach": lambda: attachments.detach(arena, nullcontext),
        "close": lambda: attachments.close(nullcontext, math.inf),
    }
    dropping = threading.Thread(target=drop[how])
    attach.start()
    at_work.wait()
    dropping.start()
    dropping.join(timeout=0.02)
    go_on.set()
    attach.join()
    dropping.join()
    assert driver.prepared == {}


@pytest.mark.parametrize("how", ["detach", "close"])
def test_nobody_waits_for_a_server_that_populates_nothing(
    attachments: Attachments, driver: Driver, how: str
) -> None:
    with mapped_arena(populated=0) as arena:
        attach = threading.Thread(target=attachments.attach, args=(arena,))
        attach.start()
        while not attachments._mappings:
            pass
        if how == "detach":
            attachments.detach(arena, nullcontext)
        else:
            attachments.close(nullcontext, math.inf)
        attach.join()
        assert driver.prepared == {}


def test_after_close_nothing_is_attached(driver: Driver, attachments: Attachments, arena: ArenaMap) -> None:
    attachments.close(nullcontext, math.inf)
    attachments.attach(arena)
    assert driver.prepared == {}
