"""The order that CUDA's streams keep, in many of the schedules that they allow."""

import logging
import threading
import time

import pytest
import torch

from lmconnector.geometry import GroupLayout
from lmconnector.transfer import attaching, cuda
from lmconnector.transfer.base import Copy
from lmconnector.transfer.cuda import CudaTransfer, batched
from paged import GEOMETRY, MIB, bytes_of, mapped_arena
from rigs import SimRig

BLOCKS, PAGE_BYTES = 8, 16
GROUPS = (GroupLayout(16, 4, 0),)
OLD, NEW, LATER = 1, 2, 3

SEEDS = pytest.mark.parametrize("seed", range(40))


def rig_of(seed: int, fail_after: int | None = None) -> SimRig:
    regions = [torch.full((BLOCKS, PAGE_BYTES), OLD, dtype=torch.uint8) for _ in range(2)]
    return SimRig(regions, GROUPS, seed, fail_after)


def a_copy(*blocks: int, value: int = NEW) -> Copy:
    return Copy(torch.full((4 * 2 * PAGE_BYTES,), value, dtype=torch.uint8), 0, 0, blocks)


def values(rig: SimRig, block: int) -> set[int]:
    return {value for region in rig.regions for value in region[block].tolist()}


def kernel(rig: SimRig, block: int) -> list[set[int]]:
    """Reads a block when its turn comes; its result is in the list."""
    seen: list[set[int]] = []
    rig.compute(lambda: seen.append(values(rig, block)))
    return seen


# --- before the step


@SEEDS
def test_a_kernel_in_flight_still_reads_the_block_of_its_own_request(seed: int) -> None:
    """Its request has ended and its block went to another one, whose load comes."""
    rig = rig_of(seed)
    for load in (rig.transfer.load, rig.transfer.load_beside):
        in_flight = kernel(rig, 1), kernel(rig, 2)
        load([a_copy(1, 5, 2)])
        rig.settle()
        assert in_flight == ([{OLD}], [{OLD}])
        rig.transfer.load([a_copy(1, 2, value=OLD)]).result()
    rig.transfer.close()


@SEEDS
def test_what_is_enqueued_after_a_load_reads_what_was_loaded(seed: int) -> None:
    rig = rig_of(seed)
    rig.transfer.load([a_copy(3)])
    after = kernel(rig, 3)
    rig.settle()
    assert after == [{NEW}]
    rig.transfer.close()


@SEEDS
def test_a_ticket_is_done_when_the_bytes_are_there(seed: int) -> None:
    rig = rig_of(seed)
    for load in (rig.transfer.load, rig.transfer.load_beside):
        ticket = load([a_copy(4, 6)])
        rig.sim.run(ticket.done)
        assert values(rig, 4) == values(rig, 6) == {NEW}
        rig.transfer.load([a_copy(4, 6, value=OLD)]).result()
    rig.transfer.close()


# --- beside the steps


@SEEDS
def test_the_engine_waits_for_no_load_beside_its_steps_and_for_no_store(seed: int) -> None:
    rig = rig_of(seed)
    for lane in rig.lanes:
        lane.held = True
    tickets = [rig.transfer.load_beside([a_copy(1)]), rig.transfer.store([a_copy(2)])]
    step = kernel(rig, 3)
    rig.sim.run_only(rig.sim.compute)
    assert step == [{OLD}]
    assert not any(ticket.done() for ticket in tickets)
    for lane in rig.lanes:
        lane.held = False
    for ticket in tickets:
        ticket.result()
    rig.transfer.close()


@pytest.mark.parametrize("slow", range(3))
def test_no_verb_queues_behind_another(slow: int) -> None:
    rig = rig_of(slow)
    verbs = [rig.transfer.store, rig.transfer.load_beside, rig.transfer.load]
    rig.lanes[2 - slow].held = True
    tickets = [verb([a_copy(block)]) for block, verb in enumerate(verbs)]
    for number, ticket in enumerate(tickets):
        if number != slow:
            ticket.result()
    assert not tickets[slow].done()
    rig.lanes[2 - slow].held = False
    tickets[slow].result()
    rig.transfer.close()


@SEEDS
def test_a_store_reads_what_was_enqueued_before_it(seed: int) -> None:
    rig = rig_of(seed)
    rig.compute(lambda: [region[2].fill_(LATER) for region in rig.regions])
    copy = a_copy(2)
    ticket = rig.transfer.store([copy])
    rig.compute(lambda: [region[6].fill_(LATER) for region in rig.regions])
    ticket.result()
    assert copy.part[:PAGE_BYTES].tolist() == [LATER] * PAGE_BYTES
    rig.settle()
    rig.transfer.close()


# --- failures


@SEEDS
def test_nothing_is_computed_over_a_load_that_failed_half_way(seed: int) -> None:
    """What it had enqueued is over before the next kernel, so that `clear` has the last word."""
    rig = rig_of(seed, fail_after=1)
    with pytest.raises(RuntimeError, match="refuses"):
        rig.transfer.load([a_copy(1)])
    rig.compute(lambda: rig.transfer.clear([1]))
    after = kernel(rig, 1)
    rig.settle()
    assert after == [{0}]
    assert values(rig, 1) == {0}
    rig.transfer.close()


@SEEDS
def test_a_ticket_that_failed_half_way_is_told_when_no_byte_moves_any_more(seed: int) -> None:
    rig = rig_of(seed, fail_after=1)
    ticket = rig.transfer.load_beside([a_copy(1)])
    with pytest.raises(RuntimeError, match="refuses"):
        ticket.result()
    rig.transfer.clear([1])
    rig.settle()
    assert values(rig, 1) == {0}
    rig.transfer.close()


# --- arenas


@pytest.mark.parametrize("seed", range(10))
def test_an_arena_is_unpinned_while_no_copy_is_under_way(seed: int) -> None:
    with mapped_arena() as arena:
        rig = rig_of(seed)
        rig.transfer.attach(arena)
        assert sum(rig.memory.prepared.values()) == GEOMETRY.capacity_bytes
        assert min(rig.memory.prepared) == arena.bytes.data_ptr() + GEOMETRY.data_at
        part = arena.data[: 4 * 2 * PAGE_BYTES]
        verbs = (rig.transfer.load, rig.transfer.load_beside, rig.transfer.store)
        tickets = [verb([Copy(part, 0, 0, (n,))]) for n in range(4) for verb in verbs]
        rig.transfer.detach(arena)
        assert rig.memory.prepared == {}
        for ticket in tickets:
            ticket.result()
        rig.transfer.close()


def test_no_copy_begins_while_an_arena_is_unpinned() -> None:
    """Each verb is tried by another thread just when the driver unpins, and has its turn afterwards."""
    with mapped_arena() as arena:
        rig = rig_of(0)
        rig.transfer.attach(arena)
        copy = Copy(arena.data[: 4 * 2 * PAGE_BYTES], 0, 0, (1,))
        verbs = (rig.transfer.load, rig.transfer.load_beside, rig.transfer.store)
        others = [threading.Thread(target=lambda verb=verb: verb([copy]).result()) for verb in verbs]
        forget = rig.memory.forget

        def meanwhile(address: int) -> int:
            if others[0].ident is None:  # for the first piece: after that one they have their turn
                for other in others:
                    other.start()
                    other.join(timeout=0.05)
                    assert other.is_alive()
            return forget(address)

        rig.memory.forget = meanwhile
        rig.transfer.detach(arena)
        for other in others:
            other.join()
        rig.transfer.close()


def test_a_pin_that_fails_in_an_unknown_way_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with mapped_arena() as arena:
        rig = rig_of(0)
        rig.memory.prepare = lambda address, size_bytes: 1 // 0
        rig.transfer.attach(arena)
        assert "arena: not pinned, copies are slower" in caplog.text
        rig.transfer.load([a_copy(1)]).result()
        assert values(rig, 1) == {NEW}
        rig.transfer.close()


def test_close_unpins_and_ends_the_threads() -> None:
    with mapped_arena() as arena:
        before = threading.active_count()
        rig = rig_of(0)
        rig.transfer.attach(arena)
        rig.transfer.store([a_copy(1)]).result()
        rig.transfer.load_beside([a_copy(1)]).result()
        assert rig.transfer.close()
        assert rig.memory.prepared == {}
        assert threading.active_count() == before


@pytest.mark.parametrize("slow", range(3))
def test_close_waits_for_no_copy_that_does_not_end_and_lets_no_memory_go_under_it(
    slow: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM would kill the process before it has told the server that it ends."""
    monkeypatch.setattr(cuda, "CLOSE_S", 0.1)
    with mapped_arena() as arena:
        rig = rig_of(slow)
        rig.transfer.attach(arena)
        rig.lanes[slow].held = True
        verb = (rig.transfer.load, rig.transfer.load_beside, rig.transfer.store)[slow]
        ticket = verb([Copy(arena.data[: 4 * 2 * PAGE_BYTES], 0, 0, (1,))])
        assert not rig.transfer.close(), "or what it writes to would be given to others"
        assert not ticket.done()
        assert sum(rig.memory.prepared.values()) == GEOMETRY.capacity_bytes
        rig.lanes[slow].held = False
        ticket.result()
        rig.settle()


def test_unpinning_a_large_arena_ends_with_the_time_there_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Half a TiB would take a minute; the driver does it when the process ends."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(cuda, "CLOSE_S", 1.0)
    monkeypatch.setattr(attaching, "PIECE_BYTES", MIB)
    with mapped_arena() as arena:
        rig = rig_of(0)
        rig.transfer.attach(arena)
        pieces, forget = len(rig.memory.prepared), rig.memory.forget

        def in_the_third_place_slowly(address: int) -> int:
            if len(rig.memory.prepared) == pieces - 2:
                time.sleep(2 * cuda.CLOSE_S)
            return forget(address)

        rig.memory.forget = in_the_third_place_slowly
        assert rig.transfer.close()
        left = len(rig.memory.prepared)
        assert left == pieces - 3
        assert f"arena: {left} pieces stay pinned until this process ends" in caplog.messages


def test_memory_of_loads_that_are_over_is_let_go() -> None:
    rig = rig_of(0)
    for _ in range(50):
        rig.transfer.load([a_copy(1)]).result()
    assert isinstance(rig.transfer, CudaTransfer)
    assert len(rig.transfer._under_way) == 1
    rig.transfer.close()


# --- vLLM's operator


def test_the_batch_has_all_addresses_in_one_call() -> None:
    calls: list[tuple[list[int], list[int], list[int], bool]] = []
    regions = [torch.zeros(BLOCKS, PAGE_BYTES, dtype=torch.uint8) for _ in range(2)]
    copies = [a_copy(1, 2), a_copy(5)]

    def operator(sources: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor, any_order: bool) -> None:
        assert {each.dtype for each in (sources, targets, sizes)} == {torch.int64}
        calls.append((sources.tolist(), targets.tolist(), sizes.tolist(), any_order))

    rig = SimRig(regions, GROUPS)
    spans = rig.transfer._pages.spans(copies)
    enqueue = batched(regions, operator)
    enqueue(spans, copies, True)
    enqueue(spans, copies, False)
    parts = [copy.part.data_ptr() for copy in copies]
    in_arena = [parts[0], parts[1], parts[0] + 4 * PAGE_BYTES, parts[1] + 4 * PAGE_BYTES]
    in_kv = [region.data_ptr() + block * PAGE_BYTES for region in regions for block in (1, 5)]
    sizes = [2 * PAGE_BYTES, PAGE_BYTES] * 2
    assert calls == [(in_arena, in_kv, sizes, True), (in_kv, in_arena, sizes, False)]
    assert bytes_of(regions[0]) == bytes(BLOCKS * PAGE_BYTES)
    rig.transfer.close()
