"""A paged KV cache, an arena, and what must come of copies between them, byte by byte."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cache_server.protocol import messages as m
from cache_server.protocol.slots import FORMAT_VERSION, SLAB_POPULATED, Geometry, write_slab
from kit import ARENA_ID, new_file
from lmconnector.arena import ArenaMap
from lmconnector.geometry import GroupLayout
from lmconnector.transfer import Copy
from processes import short_dir

MIB = 1 << 20
GEOMETRY = Geometry(16 * MIB, 2 * MIB)
ON_A_BUSY_MACHINE = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
GAP_BYTES = 7  # between two parts: nobody may touch it


class Shape(NamedTuple):
    blocks: int
    page_bytes: tuple[int, ...]
    groups: tuple[GroupLayout, ...]

    def part_bytes(self, group: int) -> int:
        return self.groups[group].blocks_per_chunk * sum(self.page_bytes)


class Where(NamedTuple):
    """A copy, before there is memory: `at` is where its part begins."""

    at: int
    group: int
    first: int
    blocks: tuple[int, ...]


@dataclass
class Case:
    shape: Shape
    wheres: list[Where]
    seed: int
    part_ends: int = field(init=False)

    def __post_init__(self) -> None:
        self.part_ends = max(
            (where.at + self.shape.part_bytes(where.group) + GAP_BYTES for where in self.wheres),
            default=GAP_BYTES,
        )

    def noise(self, count: int) -> bytes:
        return Random(f"{self.seed} {count}").randbytes(count)

    def kv(self) -> list[bytes]:
        return [Random(f"{self.seed} kv {page}").randbytes(self.shape.blocks * page)
                for page in self.shape.page_bytes]  # fmt: skip

    def copies(self, arena: torch.Tensor) -> list[Copy]:
        shape = self.shape
        return [
            Copy(arena[where.at : where.at + shape.part_bytes(where.group)], *where[1:])
            for where in self.wheres
        ]

    def pairs(self) -> Iterator[tuple[int, int, int]]:
        """(region, offset in it, offset in the arena) of every byte that a copy moves."""
        for at, group, first, blocks in self.wheres:
            offset = at
            for region, page in enumerate(self.shape.page_bytes):
                for place in range(self.shape.groups[group].blocks_per_chunk):
                    if first <= place < first + len(blocks):
                        block = blocks[place - first]
                        for byte in range(page):
                            yield region, block * page + byte, offset + byte
                    offset += page

    def after_load(self, kv: Sequence[bytes], arena: bytes) -> list[bytes]:
        regions = [bytearray(region) for region in kv]
        for region, in_region, in_arena in self.pairs():
            regions[region][in_region] = arena[in_arena]
        return [bytes(region) for region in regions]

    def after_store(self, kv: Sequence[bytes], arena: bytes) -> bytes:
        stored = bytearray(arena)
        for region, in_region, in_arena in self.pairs():
            stored[in_arena] = kv[region][in_region]
        return bytes(stored)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """No block and no place of a chunk twice; runs of blocks, forwards and backwards, and blocks all over."""
    groups = tuple(GroupLayout(16, draw(st.integers(1, 6)), 0) for _ in range(draw(st.integers(1, 3))))
    pages = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=4)))
    shape = Shape(draw(st.integers(1, 24)), pages, groups)
    forwards = list(range(shape.blocks))
    order = draw(st.sampled_from([forwards, forwards[::-1], draw(st.permutations(forwards))]))
    wheres = []
    at = GAP_BYTES
    while order and len(wheres) < 5:
        group = draw(st.integers(0, len(groups) - 1))
        per_chunk = groups[group].blocks_per_chunk
        first = draw(st.integers(0, per_chunk - 1))
        count = draw(st.integers(0, per_chunk - first))
        wheres.append(Where(at, group, first, tuple(order[:count])))
        order = order[count:]
        at += shape.part_bytes(group) + GAP_BYTES
    return Case(shape, wheres, draw(st.integers(0, 2**32)))


def tensor_of(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.cpu().contiguous().view(-1).numpy())


def regions_of(shape: Shape, kv: Sequence[bytes], device: str = "cpu") -> list[torch.Tensor]:
    return [
        tensor_of(data).view(shape.blocks, page).to(device)
        for data, page in zip(kv, shape.page_bytes, strict=True)
    ]


@contextmanager
def mapped_arena(populated: int = GEOMETRY.slabs) -> Iterator[ArenaMap]:
    """A real file, of which the server has populated the first slabs, mapped as a worker does."""
    file = new_file(GEOMETRY, populated=False)
    for slab in range(populated):
        write_slab(file, GEOMETRY, slab, SLAB_POPULATED)
    with short_dir() as directory:
        path = directory / "arena"
        path.write_bytes(file)
        yield ArenaMap.open(
            m.Arena(str(path), ARENA_ID, FORMAT_VERSION, GEOMETRY.file_bytes, GEOMETRY.capacity_bytes)
        )
