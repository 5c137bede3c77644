"""Copies between the engine's paged KV cache and parts of chunks in the arena.

A part holds, region after region, the pages of the chunk's blocks in order.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch

from lmconnector.geometry import GroupLayout


class CpuTransfer:
    """Plain copies on the calling thread: done when the call returns."""

    def __init__(self, regions: Sequence[torch.Tensor], groups: Sequence[GroupLayout]) -> None:
        self._regions = regions
        self._groups = groups

    def load(self, part: torch.Tensor, group: int, first: int, blocks: Sequence[int]) -> None:
        for region, rows in self._rows(part, group, first, len(blocks)):
            if _is_run(blocks):
                region[blocks[0] : blocks[0] + len(blocks)].copy_(rows)
            else:
                region.index_copy_(0, torch.tensor(blocks), rows)

    def store(self, part: torch.Tensor, group: int, first: int, blocks: Sequence[int]) -> None:
        for region, rows in self._rows(part, group, first, len(blocks)):
            if _is_run(blocks):
                rows.copy_(region[blocks[0] : blocks[0] + len(blocks)])
            else:
                torch.index_select(region, 0, torch.tensor(blocks), out=rows)

    def _rows(
        self, part: torch.Tensor, group: int, first: int, count: int
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Each region beside the pages of `count` blocks from `first` on in the part."""
        per_chunk = self._groups[group].blocks_per_chunk
        assert first + count <= per_chunk, "a piece lies within its chunk"
        pairs = []
        at = 0
        for region in self._regions:
            page = region.shape[1]
            begin = at + first * page
            pairs.append((region, part[begin : begin + count * page].view(count, page)))
            at += per_chunk * page
        return pairs


def _is_run(blocks: Sequence[int]) -> bool:
    return all(after - before == 1 for before, after in pairwise(blocks))
