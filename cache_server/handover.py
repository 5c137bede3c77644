"""Slabs that change hands: which ones a slot size gives up, and how they are emptied.  Pure.

A chunk leaves after its children, wherever those lie, so a slab may take many of others along.  What is
looked at and dropped in one go is bounded all the same, for the main loop serves everybody else too.  A slab
that can't be emptied in one go is closed, so that nobody reserves in it, and is emptied tick by tick.
What is found in it meanwhile, or was not in the sample by which it was chosen, may keep it: a chunk that is
leased, or was used later than all that is known of the next coldest slab.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cache_server.arena import Arena, Slab
from cache_server.index import Chunk, Index
from cache_server.protocol.slots import SlotState


@dataclass(frozen=True, slots=True)
class Bounds:
    """In chunks or entries; each is some microseconds."""

    looked_at_max: int = 2_048  # in one search for the coldest slabs
    sample_max: int = 128  # of one slab's slots
    family_max: int = 256  # of what would leave with those
    dropped_max: int = 256  # in one go


class Candidate(NamedTuple):
    last_use: int
    slab: Slab
    chunks: list[Chunk]  # those of the sample
    family: int  # how many would leave
    whole: bool  # it was looked at as a whole


class Handover:
    def __init__(self, arena: Arena, index: Index) -> None:
        self.bounds = Bounds()
        self._leaving: Slab | None = None
        self._arena = arena
        self._index = index
        self._turn = 0  # of the slabs to be looked at
        self._looked_at = 0  # in this search
        self._number = 0  # the slot of the leaving one whose turn it is
        self._cold_until: int | None = None  # the index's clock

    @property
    def leaving(self) -> Slab | None:
        """The slab that is being emptied."""
        return self._leaving if self._leaving is not None and self._leaving.closed else None

    def makes_room(self, chunk: Chunk) -> bool:
        """Whether somebody can reserve the slot that it leaves."""
        return self.leaving is None or not self._arena.slab_of(chunk.slot.number).closed

    def give_up(self, slot_bytes: int, count: int) -> list[tuple[Slab, Sequence[Chunk]]]:
        """The coldest slabs, `count` at most, that can be emptied at once, with their chunks.
        After them one may have been closed, to be emptied later."""
        if self.leaving is not None:
            return []
        given: list[tuple[Slab, Sequence[Chunk]]] = []
        left = self.bounds.dropped_max
        coldest = self._coldest(slot_bytes)
        for at, candidate in enumerate(coldest[:count], 1):
            left -= candidate.family
            if not candidate.whole or left < 0:
                self._close(candidate.slab, coldest[at].last_use if at < len(coldest) else None)
                break
            given.append((candidate.slab, candidate.chunks))
        return given

    def go_on(self) -> int:
        """Empties the leaving slab a little more; -> how many chunks have left."""
        slab, dropped, most = self.leaving, 0, self.bounds.dropped_max
        if slab is None:
            return 0
        numbers = self._arena.numbers(slab)
        look_end = min(numbers.stop, self._number + self.bounds.looked_at_max)
        while slab.closed and slab.used and self._number < look_end and dropped < most:
            root = self._chunk_at(self._number)
            if root is None:
                self._number += 1
            else:
                dropped += self._drop_under(root, slab, most - dropped)
        if not slab.used:
            self._arena.uncut(slab)
        elif self._number == numbers.stop:
            slab.closed = False
        return dropped

    def _close(self, slab: Slab, cold_until: int | None) -> None:
        slab.closed = True
        self._leaving = slab
        self._number = self._arena.numbers(slab).start
        self._cold_until = cold_until

    def _coldest(self, slot_bytes: int) -> list[Candidate]:
        """Of the slabs whose turn it is; of all of them, where these are few."""
        slabs = self._arena.slabs_of(slot_bytes)
        found: list[Candidate] = []
        turns = self._looked_at = 0
        while turns < len(slabs) and self._looked_at < self.bounds.looked_at_max:
            candidate = self._candidate(slabs[(self._turn + turns) % len(slabs)])
            turns += 1
            if candidate is not None:
                found.append(candidate)
        self._turn += turns
        return sorted(found, key=lambda candidate: (candidate.last_use, candidate.slab.number))

    def _candidate(self, slab: Slab) -> Candidate | None:
        """None: it is empty, or somebody may write or read in it."""
        if not slab.used or slab.reserved:
            return None
        numbers = self._arena.numbers(slab)
        sample = numbers[:: -(-len(numbers) // self.bounds.sample_max)]
        chunks = [chunk for number in sample if (chunk := self._chunk_at(number)) is not None]
        self._looked_at += len(sample)
        if len(sample) == len(numbers) and len(chunks) != slab.used:
            return None
        family = self._index.some_of_family(chunks, self.bounds.family_max)
        self._looked_at += len(family)
        if any(chunk.leases for chunk in family):
            return None
        # The uses of a chunk that has been found are not yet handed on to those before it.
        last_use = max(
            slab.last_use,
            max((chunk.stamp for chunk in chunks), default=0),
            max((chunk.stamp for chunk in family if chunk.hits), default=0),
        )
        whole = len(sample) == len(numbers) and len(family) < self.bounds.family_max
        return Candidate(last_use, slab, chunks, len(family), whole)

    def _chunk_at(self, number: int) -> Chunk | None:
        entry = self._arena.entry(number)
        if entry is None or entry.state != SlotState.COMMITTED:
            return None
        chunk = self._index.find(entry.prefix, entry.group, entry.hash)
        return chunk if chunk is not None and chunk.slot.number == number else None

    def _drop_under(self, root: Chunk, slab: Slab, most: int) -> int:
        """Its descendants and then itself, `most` chunks at most.  One that may not leave keeps the slab."""
        chunk, dropped = root, 0
        while dropped < most:
            while chunk.children:
                chunk = next(iter(chunk.children))
            if self._may_not_leave(chunk):
                slab.closed, slab.last_use = False, max(slab.last_use, chunk.stamp)
                break
            parent = chunk.parent
            self._index.drop([chunk])
            self._arena.free(chunk.slot)
            dropped += 1
            if chunk is root or parent is None:
                break
            chunk = parent
        return dropped

    def _may_not_leave(self, chunk: Chunk) -> bool:
        warm = self._cold_until is not None and chunk.hits > 0 and chunk.stamp > self._cold_until
        return warm or chunk.leases > 0
