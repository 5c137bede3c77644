"""What only the CPU's engine promises: it holds up nobody who computes in Python."""

import threading
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import torch

from lmconnector.geometry import GroupLayout
from lmconnector.transfer import cpu
from lmconnector.transfer.base import Copy
from lmconnector.transfer.cpu import CpuTransfer, MappedMemory
from paged import GEOMETRY, mapped_arena

BLOCKS, PAGE_BYTES = 1024, 64 << 10
ROUNDS = 200


def big() -> tuple[torch.Tensor, CpuTransfer, Copy]:
    region = torch.zeros(BLOCKS, PAGE_BYTES, dtype=torch.uint8)
    part = torch.zeros(BLOCKS * PAGE_BYTES, dtype=torch.uint8)
    transfer = CpuTransfer([region], [GroupLayout(16, BLOCKS, 0)])
    return region, transfer, Copy(part, 0, 0, tuple(range(BLOCKS)))


def test_the_gil_is_free_during_a_copy() -> None:
    """Somebody sees a single copy half done, which nobody could who waits for the GIL."""
    region, transfer, copy = big()
    pages = region.numpy()
    for number in range(1, ROUNDS):
        copy.part.fill_(number)
        ticket = transfer.load_beside([copy])
        while not ticket.done():
            if pages[0, 0] == number != pages[-1, -1]:
                ticket.result()
                transfer.close()
                return
    raise AssertionError("no copy was ever seen half done")


def test_close_ends_every_load() -> None:
    """The one under way is waited for, the ones behind it end as cancelled."""
    _region, transfer, copy = big()
    tickets = [transfer.load_beside([copy]) for _ in range(20)]
    assert transfer.close()
    assert all(ticket.done() for ticket in tickets)
    with pytest.raises(CancelledError):
        tickets[-1].result()


def test_close_waits_for_no_copy_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CLOSE_S", 0.1)
    _region, transfer, copy = big()
    may_end = threading.Event()
    transfer._copy = lambda *_: may_end.wait(10)
    ticket = transfer.load_beside([copy])
    assert not transfer.close(), "or what it writes to would be given to others"
    assert not ticket.done()
    may_end.set()
    ticket.result(10)


def resident_pages(address: int) -> int:
    """Of the mapping that begins there: in this process' own page tables."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    begin = next(at for at, line in enumerate(lines) if line.startswith(f"{address:x}-"))
    return next(int(line.split()[1]) for line in lines[begin:] if line.startswith("Rss:")) * 1024 // 4096


def test_an_attached_arena_has_its_page_tables() -> None:
    """The first copy meets no page faults."""
    _region, transfer, _copy = big()
    with mapped_arena() as arena:
        before = resident_pages(arena.bytes.data_ptr())
        transfer.attach(arena)
        assert before < 100
        assert resident_pages(arena.bytes.data_ptr()) >= GEOMETRY.capacity_bytes // 4096
        transfer.detach(arena)
    transfer.close()


def test_a_kernel_that_can_not_is_told_in_words() -> None:
    memory = MappedMemory()
    code = memory.prepare(4096 + 1, 4096)
    assert memory.explain(code) == "Invalid argument"
