"""What every copy engine does, on every device that is there."""

import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given

from kit import KIB
from lmconnector.arena import ArenaMap
from lmconnector.errors import UnsupportedError
from lmconnector.geometry import GroupLayout
from lmconnector.transfer import Copy, new_transfer
from paged import ON_A_BUSY_MACHINE, Case, Shape, Where, bytes_of, cases, mapped_arena, regions_of, tensor_of
from rigs import ENGINES, rig_of

GROUPS = (GroupLayout(16, 4, 0), GroupLayout(16, 2, 3))
SHAPE = Shape(16, (40, 24), GROUPS)
CASE = Case(SHAPE, [Where(7, 0, 1, (9, 3, 4)), Where(300, 1, 0, (15, 0))], 1)


# --- bytes


@ENGINES
@ON_A_BUSY_MACHINE
@given(case=cases())
def test_a_load_moves_just_its_bytes(engine: str, case: Case) -> None:
    rig, data = rig_of(engine, case), case.noise(case.part_ends)
    arena = tensor_of(data)
    rig.transfer.load(case.copies(arena)).result()
    assert rig.kv() == case.after_load(case.kv(), data)
    assert bytes_of(arena) == data
    rig.transfer.close()


@ENGINES
@ON_A_BUSY_MACHINE
@given(case=cases())
def test_a_load_beside_the_steps_moves_the_same(engine: str, case: Case) -> None:
    rig, data = rig_of(engine, case), case.noise(case.part_ends)
    ticket = rig.transfer.load_beside(case.copies(tensor_of(data)))
    ticket.result()
    assert ticket.done()
    assert rig.kv() == case.after_load(case.kv(), data)
    rig.transfer.close()


@ENGINES
@ON_A_BUSY_MACHINE
@given(case=cases())
def test_a_store_moves_just_its_bytes(engine: str, case: Case) -> None:
    rig, data = rig_of(engine, case), case.noise(case.part_ends)
    arena = tensor_of(data)
    ticket = rig.transfer.store(case.copies(arena))
    ticket.result()
    assert ticket.done()
    assert bytes_of(arena) == case.after_store(case.kv(), data)
    assert rig.kv() == case.kv()
    rig.transfer.close()


@ENGINES
@ON_A_BUSY_MACHINE
@given(case=cases())
def test_what_is_stored_is_loaded_again(engine: str, case: Case) -> None:
    rig = rig_of(engine, case)
    copies = case.copies(tensor_of(case.noise(case.part_ends)))
    rig.transfer.store(copies).result()
    other = replace(case, seed=case.seed + 1)
    again = rig_of(engine, other)
    again.transfer.load(copies)
    moved = {block for copy in copies for block in copy.blocks}
    for page, ours, theirs, before in zip(
        case.shape.page_bytes, rig.kv(), again.kv(), other.kv(), strict=True
    ):
        for block in range(case.shape.blocks):
            at = slice(block * page, (block + 1) * page)
            assert theirs[at] == (ours if block in moved else before)[at]
    rig.transfer.close()
    again.transfer.close()


# --- order


@ENGINES
def test_the_engine_computes_on_what_was_loaded(engine: str) -> None:
    """Nobody waits for the ticket: a kernel that is enqueued next finds the bytes."""
    rig, data = rig_of(engine, CASE), CASE.noise(CASE.part_ends)
    rig.transfer.load(CASE.copies(tensor_of(data)))
    assert rig.kv() == CASE.after_load(CASE.kv(), data)
    rig.transfer.close()


@ENGINES
def test_a_store_has_what_was_computed_before_it(engine: str) -> None:
    rig, arena = rig_of(engine, CASE), torch.zeros(CASE.part_ends, dtype=torch.uint8)
    newer = replace(CASE, seed=2).kv()
    rig.fill(regions_of(SHAPE, newer, str(rig.regions[0].device)))
    rig.transfer.store(CASE.copies(arena)).result()
    assert bytes_of(arena) == CASE.after_store(newer, bytes(CASE.part_ends))
    rig.transfer.close()


@ENGINES
def test_many_copies_at_once(engine: str) -> None:
    """Loads beside the steps, loads before a step and stores, each of other blocks."""
    shape = Shape(96, (64, 8 * KIB), (GroupLayout(16, 8, 0),))
    size = shape.part_bytes(0)
    case = Case(shape, [Where(n * size, 0, 0, tuple(range(n * 8, n * 8 + 8))) for n in range(12)], 3)
    rig, data = rig_of(engine, case), case.noise(case.part_ends)
    arena = tensor_of(data)
    copies = case.copies(arena)
    verbs = [rig.transfer.load_beside, rig.transfer.load, rig.transfer.store]
    tickets = [verbs[n % 3]([copy]) for n, copy in enumerate(copies)]
    for ticket in tickets:
        ticket.result()
        assert ticket.done()
    loaded = replace(case, wheres=[where for n, where in enumerate(case.wheres) if n % 3 < 2])
    stored = replace(case, wheres=case.wheres[2::3])
    assert rig.kv() == loaded.after_load(case.kv(), data)
    assert bytes_of(arena)[: 12 * size] == stored.after_store(case.kv(), data)[: 12 * size]
    rig.transfer.close()


# --- what does not fit


def misfits() -> dict[str, Copy]:
    arena = torch.zeros(4 * KIB, dtype=torch.uint8)
    part, other = arena[: SHAPE.part_bytes(0)], arena[: SHAPE.part_bytes(1)]
    return {
        "no such block": Copy(part, 0, 0, (16,)),
        "a negative block": Copy(part, 0, 0, (3, -1)),
        "beyond the chunk": Copy(part, 0, 3, (1, 2)),
        "before the chunk": Copy(part, 0, -1, (1, 2)),
        "another group's part": Copy(other, 0, 0, (1,)),
        "the end of the arena": Copy(arena[-SHAPE.part_bytes(0) + 1 :], 0, 0, (1,)),
        "no such group": Copy(part, 2, 0, (1,)),
        "a negative group": Copy(other, -1, 0, (1,)),
    }


@ENGINES
@pytest.mark.parametrize("which", misfits())
def test_a_copy_that_does_not_fit_is_refused_whole(engine: str, which: str) -> None:
    rig = rig_of(engine, CASE)
    good = Copy(torch.ones(SHAPE.part_bytes(0), dtype=torch.uint8), 0, 0, (5,))
    for verb in (rig.transfer.load, rig.transfer.load_beside, rig.transfer.store):
        with pytest.raises(ValueError, match=r"\d"):
            verb([good, misfits()[which]])
    assert rig.kv() == CASE.kv()
    assert good.part.min() == 1
    rig.transfer.close()


@ENGINES
def test_nothing_to_copy_is_done(engine: str) -> None:
    rig = rig_of(engine, CASE)
    part = torch.zeros(SHAPE.part_bytes(0), dtype=torch.uint8)
    for copies in ([], [Copy(part, 0, 4, ())]):
        for verb in (rig.transfer.load, rig.transfer.load_beside, rig.transfer.store):
            verb(copies).result()
    assert rig.kv() == CASE.kv()
    rig.transfer.close()


@pytest.mark.parametrize("device", ["meta"])
def test_another_device_is_refused_by_name(device: str) -> None:
    regions = [torch.empty(4, 8, dtype=torch.uint8, device=device)]
    with pytest.raises(UnsupportedError, match=r"meta.*supported are the CPU and one CUDA device"):
        new_transfer(regions, GROUPS)


def test_regions_on_two_devices_are_refused() -> None:
    here, there = (torch.empty(4, 8, dtype=torch.uint8, device=device) for device in ("cpu", "meta"))
    with pytest.raises(UnsupportedError, match="cpu, meta"):
        new_transfer([here, there], GROUPS)


# --- clear, attach, close


@ENGINES
def test_clear_zeroes_these_blocks_and_no_others(engine: str) -> None:
    rig = rig_of(engine, CASE)
    rig.transfer.clear([0, 15, 7])
    rig.transfer.clear([])
    expected = [bytearray(region) for region in CASE.kv()]
    for region, page in zip(expected, SHAPE.page_bytes, strict=True):
        for block in (0, 7, 15):
            region[block * page : (block + 1) * page] = bytes(page)
    assert rig.kv() == [bytes(region) for region in expected]
    for wrong in ([16], [-1]):
        with pytest.raises(ValueError, match="16"):
            rig.transfer.clear(wrong)
    rig.transfer.close()


def round_trip(engine: str, arena: ArenaMap) -> None:
    """Through the arena's last slot, with whatever is pinned by now."""
    case = replace(CASE, wheres=[Where(len(arena.bytes) - SHAPE.part_bytes(0), 0, 0, (8, 9, 2, 1))])
    rig = rig_of(engine, case)
    for number in range(3):
        if number:
            rig.transfer.attach(arena)
        rig.transfer.store(case.copies(arena.bytes)).result()
        rig.transfer.clear((8, 9, 2, 1))
        rig.transfer.load(case.copies(arena.bytes)).result()
        assert rig.kv() == case.kv()
        if number:
            rig.transfer.detach(arena)
    rig.transfer.attach(arena)
    rig.transfer.close()


@ENGINES
def test_an_arena_is_attached_and_detached_again_and_again(engine: str) -> None:
    with mapped_arena() as arena:
        round_trip(engine, arena)


@ENGINES
def test_close_ends_an_attach_that_waits_for_the_server(engine: str) -> None:
    rig = rig_of(engine, CASE)
    with mapped_arena(populated=0) as arena:
        attach = threading.Thread(target=rig.transfer.attach, args=(arena,))
        attach.start()
        rig.transfer.close()
        attach.join()


@ENGINES
def test_close_waits_for_what_is_under_way(engine: str) -> None:
    rig, data = rig_of(engine, CASE), CASE.noise(CASE.part_ends)
    copies = CASE.copies(tensor_of(data))
    tickets = [rig.transfer.load_beside(copies[:1]), rig.transfer.load(copies[1:])]
    rig.transfer.close()
    assert all(ticket.done() for ticket in tickets)
    both, second = CASE, replace(CASE, wheres=CASE.wheres[1:])  # the first may not have begun
    assert rig.kv() in [case.after_load(CASE.kv(), data) for case in (both, second)]
