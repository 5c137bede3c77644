"""What crosses between the scheduler's and the workers' connectors, inside vLLM's own messages."""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from cache_server.protocol.keys import SlotRef

NO_BLOCK = 0  # vLLM's null block: the group no longer needs, or never had, this one


class Piece(NamedTuple):
    """Part of one chunk of one cache group: where it lies, and the engine's blocks from `first` on in it."""

    group: int
    slot: SlotRef
    hash: bytes
    first: int
    blocks: tuple[int, ...]


@dataclass(slots=True)
class Load:
    """Into a request's blocks; before the step's forward pass if `at_once`, else beside the coming steps."""

    number: int
    request: str
    at_once: bool
    pieces: list[Piece]
    lost: tuple[int, ...] = ()  # blocks that can't be loaded: then it fails, and they are recomputed

    @property
    def blocks(self) -> list[int]:
        return [*self.lost, *(block for piece in self.pieces for block in piece.blocks)]


@dataclass(slots=True)
class Store:
    number: int
    pieces: list[Piece]


@dataclass(slots=True)
class Plan:
    """One step's work for all workers; `part_offsets`: per group, where each part begins in a slot."""

    arena: bytes = b""
    part_offsets: dict[int, tuple[int, ...]] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    stores: list[Store] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """What one or several workers did in a step: by how many of them each job was ended, and which failed."""

    ended: Counter[int] = field(default_factory=Counter)
    failed: set[int] = field(default_factory=set)
    loaded_blocks: int = 0
    load_us: int = 0

    def __bool__(self) -> bool:
        return bool(self.ended)

    def merged(self, other: "Outcome") -> "Outcome":
        return Outcome(
            self.ended + other.ended,
            self.failed | other.failed,
            self.loaded_blocks + other.loaded_blocks,
            self.load_us + other.load_us,
        )
