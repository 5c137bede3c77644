"""Copies -> stretches of bytes that lie in one piece on both sides.  Pure.

A part holds, region after region, the pages of the chunk's blocks in order:

    | region 0: block 0, block 1, ... | region 1: block 0, block 1, ... | ...
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lmconnector.geometry import GroupLayout
from lmconnector.transfer.base import Copy

Longs = NDArray[np.int64]


class Spans(NamedTuple):
    """Columns of equal length; offsets and sizes are bytes."""

    region: Longs
    in_region: Longs
    copy: Longs  # which one of the copies
    in_part: Longs
    size: Longs


class Pages:
    """The regions' shape: `blocks` pages in each of them, and how long those are."""

    def __init__(self, blocks: int, page_bytes: Sequence[int], groups: Sequence[GroupLayout]) -> None:
        self.page_bytes = tuple(page_bytes)
        self.block_bytes = sum(page_bytes)
        self._blocks = blocks
        self._per_chunk = [group.blocks_per_chunk for group in groups]
        self._before = [sum(page_bytes[:region]) for region in range(len(page_bytes))]

    def check(self, copies: Sequence[Copy]) -> None:
        """Raises `ValueError`: addresses are made of these numbers."""
        for part, group, first, blocks in copies:
            if not 0 <= group < len(self._per_chunk):
                raise ValueError(f"a copy in cache group {group}: there are {len(self._per_chunk)}")
            per_chunk = self._per_chunk[group]
            if first < 0 or first + len(blocks) > per_chunk:
                raise ValueError(
                    f"blocks {first}..{first + len(blocks)} of a chunk of group {group}: it has {per_chunk}"
                )
            if part.numel() != per_chunk * self.block_bytes:
                expected = per_chunk * self.block_bytes
                raise ValueError(f"a part of {part.numel()} bytes in group {group}: expected {expected}")
            self.check_blocks(blocks)

    def check_blocks(self, blocks: Sequence[int]) -> None:
        if blocks and not 0 <= min(blocks) <= max(blocks) < self._blocks:
            raise ValueError(f"blocks {min(blocks)}..{max(blocks)}: the KV cache has {self._blocks}")

    def in_part(self, copy: Copy) -> list[int]:
        """Where the first page of the copy lies, for each region."""
        per_chunk = self._per_chunk[copy.group]
        return [
            per_chunk * before + copy.first * page
            for before, page in zip(self._before, self.page_bytes, strict=True)
        ]

    def spans(self, copies: Sequence[Copy]) -> Spans:
        """One for each region and run of consecutive blocks."""
        counts = np.array([len(copy.blocks) for copy in copies], np.int64)
        firsts = np.array([copy.first for copy in copies], np.int64)
        per_chunk = np.array([self._per_chunk[copy.group] for copy in copies], np.int64)
        blocks = np.fromiter(chain.from_iterable(copy.blocks for copy in copies), np.int64)
        owner = np.repeat(np.arange(len(copies)), counts)
        place = np.arange(len(blocks)) + (firsts - np.cumsum(counts) + counts)[owner]  # in its chunk
        begins = np.ones(len(blocks), np.bool_)
        begins[1:] = (np.diff(blocks) != 1) | (np.diff(owner) != 0)
        runs = np.flatnonzero(begins)
        owner, regions = owner[runs], len(self.page_bytes)
        page, before = np.array([self.page_bytes, self._before], np.int64)[:, :, None]
        return Spans(
            region=np.repeat(np.arange(regions), len(runs)),
            in_region=(blocks[runs] * page).ravel(),
            copy=np.tile(owner, regions),
            in_part=(per_chunk[owner] * before + place[runs] * page).ravel(),
            size=(np.diff(runs, append=len(blocks)) * page).ravel(),
        )


def cut(spans: Spans, addresses: Longs, every_bytes: int) -> Spans:
    """The same bytes, with no multiple of `every_bytes` inside a span; `addresses`: where the spans begin."""
    ends = addresses + spans.size
    piece = addresses // every_bytes
    counts = (ends - 1) // every_bytes - piece + 1
    if (counts == 1).all():
        return spans
    of = np.repeat(np.arange(len(counts)), counts)
    piece = piece[of] + np.arange(len(of)) - (np.cumsum(counts) - counts)[of]
    begins = np.maximum(addresses[of], piece * every_bytes)
    skipped = begins - addresses[of]
    return Spans(
        region=spans.region[of],
        in_region=spans.in_region[of] + skipped,
        copy=spans.copy[of],
        in_part=spans.in_part[of] + skipped,
        size=np.minimum(ends[of], (piece + 1) * every_bytes) - begins,
    )
