"""Copies as stretches of bytes, moved here by one memmove each."""

import ctypes
from itertools import pairwise

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmconnector.geometry import GroupLayout
from lmconnector.transfer.base import Copy
from lmconnector.transfer.runs import Pages, Spans, cut
from paged import ON_A_BUSY_MACHINE, Case, bytes_of, cases, regions_of, tensor_of

GROUPS = (GroupLayout(16, 8, 0), GroupLayout(16, 4, 0))
PAGES = Pages(100, (10, 6), GROUPS)


def copy_of(*blocks: int, first: int = 0, group: int = 0) -> Copy:
    return Copy(torch.zeros(16 * GROUPS[group].blocks_per_chunk, dtype=torch.uint8), group, first, blocks)


def rows(spans: Spans) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in spans), strict=True))


@ON_A_BUSY_MACHINE
@given(cases(), st.integers(1, 64))
def test_the_stretches_are_the_bytes_of_the_copies(case: Case, every_bytes: int) -> None:
    data = case.noise(case.part_ends)
    arena, regions = tensor_of(data), regions_of(case.shape, case.kv())
    copies = case.copies(arena)
    pages = Pages(case.shape.blocks, case.shape.page_bytes, case.shape.groups)
    spans = pages.spans(copies)
    in_arena = np.array([copy.part.data_ptr() for copy in copies], np.int64)[spans.copy] + spans.in_part
    spans = cut(spans, in_arena, every_bytes)
    for region, in_region, copy, in_part, size in rows(spans):
        source, target = copies[copy].part.data_ptr() + in_part, regions[region].data_ptr() + in_region
        assert size > 0
        assert source // every_bytes == (source + size - 1) // every_bytes
        ctypes.memmove(target, source, size)
    assert [bytes_of(region) for region in regions] == case.after_load(case.kv(), data)


def test_there_is_one_for_each_region_and_run_of_blocks() -> None:
    spans = PAGES.spans([copy_of(4, 5, 6, 9, 8, first=2)])
    assert rows(spans) == [
        (0, 40, 0, 20, 30), (0, 90, 0, 50, 10), (0, 80, 0, 60, 10),
        (1, 24, 0, 92, 18), (1, 54, 0, 110, 6), (1, 48, 0, 116, 6),
    ]  # fmt: skip


def test_a_run_ends_with_its_copy() -> None:
    """Two chunks lie in two slots, also where the engine's blocks go on."""
    spans = PAGES.spans([copy_of(1, 2), copy_of(3, 4, group=1)])
    assert [(row[0], row[2], row[4]) for row in rows(spans)] == [
        (0, 0, 20),
        (0, 1, 20),
        (1, 0, 12),
        (1, 1, 12),
    ]


def test_an_empty_copy_has_none() -> None:
    assert rows(PAGES.spans([])) == rows(PAGES.spans([copy_of(), copy_of()])) == []
    assert rows(PAGES.spans([copy_of(), copy_of(7), copy_of()])) == [(0, 70, 1, 0, 10), (1, 42, 1, 80, 6)]


def test_a_cut_keeps_what_lies_within_a_piece() -> None:
    spans = PAGES.spans([copy_of(4, 5, 6)])
    addresses = np.array([1000, 2048], np.int64)
    assert cut(spans, addresses, 1 << 20) is spans
    pieces = rows(cut(spans, addresses, 1024))
    assert pieces == [(0, 40, 0, 0, 24), (0, 64, 0, 24, 6), (1, 24, 0, 80, 18)]


def test_a_cut_of_a_long_stretch_has_many_pieces() -> None:
    spans = Spans(*(np.array([value], np.int64) for value in (0, 5, 0, 7, 1000)))
    pieces = rows(cut(spans, np.array([90], np.int64), 100))
    assert [piece[4] for piece in pieces] == [10, *[100] * 9, 90]
    assert all(
        after[1] - before[1] == after[3] - before[3] == before[4] for before, after in pairwise(pieces)
    )
