"""What only a CUDA device shows: its streams, its pinning, vLLM's operator; all else is in tests/contract."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given

from lmconnector.arena import ArenaMap
from lmconnector.geometry import GroupLayout
from lmconnector.transfer import Copy, attaching, cuda
from lmconnector.transfer.cuda import CudaTransfer, Enqueue, PinnedMemory, batched, best_enqueue, one_by_one
from paged import ON_A_BUSY_MACHINE, Case, bytes_of, cases, mapped_arena, regions_of
from rigs import NEEDS_CUDA

pytestmark = NEEDS_CUDA

BLOCKS, PAGE_BYTES, REGIONS = 64, 32 << 10, 4
GROUPS = (GroupLayout(16, 16, 0),)
PART_BYTES = 16 * REGIONS * PAGE_BYTES
OLD, NEW = 1, 2
A_WHILE = 500_000_000  # cycles of the device: some tenths of a second
OUT_OF_MEMORY = 2
PIECE_BYTES = 64 << 10


@pytest.fixture
def arena() -> Iterator[ArenaMap]:
    with mapped_arena() as mapped:
        yield mapped


def new_regions() -> list[torch.Tensor]:
    return [torch.full((BLOCKS, PAGE_BYTES), OLD, dtype=torch.uint8, device="cuda") for _ in range(REGIONS)]


def way(name: str, regions: Sequence[torch.Tensor]) -> Enqueue:
    if name == "one by one":
        return one_by_one(regions)
    found = best_enqueue(regions)
    if found.__qualname__.startswith(one_by_one.__name__):
        pytest.skip("this vLLM has no swap_blocks_batch for CUDA")
    assert found.__qualname__.startswith(batched.__name__)
    return found


class Scarce(PinnedMemory):
    """Pins every other piece, and pretends to have pinned the rest."""

    def prepare(self, address: int, size_bytes: int) -> int:
        return super().prepare(address, size_bytes) if address // PIECE_BYTES % 2 else 0

    def forget(self, address: int) -> int:
        return super().forget(address) if address // PIECE_BYTES % 2 else 0


@pytest.mark.parametrize("pinned", ["not at all", "every other piece", "whole"])
@pytest.mark.parametrize("name", ["one by one", "batched"])
def test_bytes_are_right_however_much_is_pinned(
    name: str, pinned: str, arena: ArenaMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are so small that the pages of a chunk lie on both sides of their borders."""
    for module in (cuda, attaching):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE_BYTES)
    monkeypatch.setattr(attaching, "REST", 0.0)
    regions = new_regions()
    memory = Scarce() if pinned == "every other piece" else None
    transfer = CudaTransfer(regions, GROUPS, enqueue=way(name, regions), memory=memory)
    if pinned != "not at all":
        transfer.attach(arena)
    wheres = [1000 + number * PART_BYTES for number in range(4)]
    copies = [Copy(arena.data[at : at + PART_BYTES], 0, 0, tuple(range(n, BLOCKS, 4)))
              for n, at in enumerate(wheres)]  # fmt: skip
    for number, region in enumerate(regions):
        region.copy_(torch.randint(256, region.shape, dtype=torch.uint8) + number)
    before = [bytes_of(region) for region in regions]
    transfer.store(copies).result()
    transfer.clear(range(BLOCKS))
    assert not any(region.any() for region in regions)
    transfer.load(copies[:2])
    transfer.load_beside(copies[2:]).result()
    assert [bytes_of(region) for region in regions] == before
    transfer.detach(arena)
    transfer.close()


@pytest.mark.parametrize("name", ["one by one", "batched"])
@ON_A_BUSY_MACHINE
@given(case=cases())
def test_any_copies_are_right(name: str, case: Case) -> None:
    data = case.noise(case.part_ends)
    part = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    regions = regions_of(case.shape, case.kv(), "cuda")
    transfer = CudaTransfer(regions, case.shape.groups, enqueue=way(name, regions))
    transfer.load(case.copies(part))
    assert [bytes_of(region) for region in regions] == case.after_load(case.kv(), data)
    transfer.close()


def test_an_arena_is_pinned_from_attach_to_detach(arena: ArenaMap) -> None:
    transfer = CudaTransfer(new_regions(), GROUPS)
    part = arena.data[:PART_BYTES]
    assert not part.is_pinned()
    for _ in range(2):
        transfer.attach(arena)
        assert part.is_pinned()
        assert arena.data[-PART_BYTES:].is_pinned()
        transfer.detach(arena)
        assert not part.is_pinned()
    transfer.attach(arena)
    transfer.close()
    assert not part.is_pinned()


def test_a_load_waits_for_kernels_and_kernels_for_it(arena: ArenaMap) -> None:
    regions = new_regions()
    transfer = CudaTransfer(regions, GROUPS)
    transfer.attach(arena)
    arena.data[:PART_BYTES].fill_(NEW)
    torch.cuda._sleep(A_WHILE)
    in_flight = regions[0][3].clone()
    ticket = transfer.load([Copy(arena.data[:PART_BYTES], 0, 0, (3,))])
    after = regions[0][3].clone()
    assert not ticket.done()
    assert in_flight.unique().tolist() == [OLD]
    assert after.unique().tolist() == [NEW]
    assert ticket.done()
    transfer.close()


def test_stores_and_loads_beside_the_steps_wait_for_kernels_and_hold_up_nobody(arena: ArenaMap) -> None:
    regions = new_regions()
    transfer = CudaTransfer(regions, GROUPS)
    transfer.attach(arena)
    arena.data[:PART_BYTES].fill_(NEW)
    torch.cuda._sleep(A_WHILE)
    in_flight = regions[0][3].clone()
    for region in regions:
        region[4].fill_(7)
    tickets = [
        transfer.load_beside([Copy(arena.data[:PART_BYTES], 0, 0, (3,))]),
        transfer.store([Copy(arena.data[PART_BYTES : 2 * PART_BYTES], 0, 0, (4,))]),
    ]
    assert not any(ticket.done() for ticket in tickets)
    for ticket in tickets:
        ticket.result()
    assert in_flight.unique().tolist() == [OLD]
    assert regions[0][3].unique().tolist() == [NEW]
    assert arena.data[PART_BYTES : PART_BYTES + PAGE_BYTES].unique().tolist() == [7]
    transfer.close()


def test_a_driver_that_pins_nothing_is_a_warning(arena: ArenaMap, caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(PinnedMemory):
        def prepare(self, address: int, size_bytes: int) -> int:
            return OUT_OF_MEMORY

    regions = new_regions()
    transfer = CudaTransfer(regions, GROUPS, memory=Refusing())
    transfer.attach(arena)
    assert "error 2 (out of memory)" in caplog.text
    part = arena.data[:PART_BYTES].fill_(NEW)
    transfer.load([Copy(part, 0, 0, (5, 6))])
    assert regions[-1][6].unique().tolist() == [NEW]
    transfer.close()
