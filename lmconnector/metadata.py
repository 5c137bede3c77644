"""What crosses between the scheduler's and the workers' connectors, inside vLLM's own messages."""

from dataclasses import dataclass, field
from typing import NamedTuple

from cache_server.protocol.keys import SlotRef


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

    request: str
    at_once: bool
    pieces: list[Piece]
    lost: tuple[int, ...] = ()  # blocks that can't be loaded: then it fails, and they are recomputed


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
    """What one or several workers did in a step: how many of them ended each job, and which failed."""

    stored: dict[int, int] = field(default_factory=dict)
    not_stored: set[int] = field(default_factory=set)
    loaded: dict[str, int] = field(default_factory=dict)
    not_loaded: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        return bool(self.stored or self.loaded)

    def merged(self, other: "Outcome") -> "Outcome":
        return Outcome(
            {job: self.stored.get(job, 0) + other.stored.get(job, 0) for job in self.stored | other.stored},
            self.not_stored | other.not_stored,
            {
                name: self.loaded.get(name, 0) + other.loaded.get(name, 0)
                for name in self.loaded | other.loaded
            },
            self.not_loaded | other.not_loaded,
        )
