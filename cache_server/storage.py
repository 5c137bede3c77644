"""Arena and index as one: what is stored where, and who makes room for whom.  Pure."""

from collections.abc import Sequence
from enum import Enum

from cache_server.arena import Arena, Key, Slab
from cache_server.handover import Handover
from cache_server.index import Admission, Chunk, Index, Space
from cache_server.protocol.keys import SlotRef, is_canary
from cache_server.protocol.messages import Outcome
from cache_server.protocol.slots import NO_NUMBER, Entry


class Shortage(Enum):
    POPULATING = "fresh memory is still being populated"
    LEAVING = "space that another slot size gives up is being emptied"
    FULL = "everything that could leave is leased or reserved"
    NO_SPARE = "nothing is free, and a canary evicts nothing"


class Storage:
    def __init__(self, arena: Arena, index: Index) -> None:
        self.arena = arena
        self.index = index
        self.evicted = 0
        self.restored = 0
        self.spare_slots = 0  # of each size that is asked for: kept free for canaries
        self._handover = Handover(arena, index)
        self._restore()

    def reserve(
        self, slot_bytes: int, count: int, owner: bytes, sizes_in_use: Sequence[int]
    ) -> list[SlotRef] | Shortage:
        """All of it or, with nothing changed, none.  Every slot size in use is entitled to an equal share of
        the slabs; beyond that, space belongs to whoever uses it."""
        missing = count - self.arena.available(slot_bytes)
        if missing > 0:
            if self.arena.populating:
                return Shortage.POPULATING
            if not self._make_room(slot_bytes, missing, sizes_in_use):
                return Shortage.LEAVING if self._handover.leaving is not None else Shortage.FULL
        slots = self.arena.reserve(slot_bytes, count, owner)
        lacking = self.spare_slots - self.arena.available(slot_bytes)
        if lacking > 0 and not self.arena.populating:
            self._make_room(slot_bytes, lacking, sizes_in_use)
        return slots

    def reserve_spare(self, slot_bytes: int, count: int, owner: bytes) -> list[SlotRef] | Shortage:
        """Of what is free."""
        if self.arena.available(slot_bytes) < count:
            return Shortage.POPULATING if self.arena.populating else Shortage.NO_SPARE
        return self.arena.reserve(slot_bytes, count, owner)

    def hand_over(self) -> None:
        """A little more of what is on its way from one slot size to another."""
        self.evicted += self._handover.go_on()

    @property
    def canary_chunks(self) -> int:
        return sum(len(space.chunks) for space in self.index.spaces if is_canary(space.prefix))

    def drop_canaries(self, sizes_in_use: Sequence[int]) -> None:
        """All that canaries have committed, and the slabs that were cut for them."""
        self.clear([space for space in self.index.spaces if is_canary(space.prefix)])
        for size in self.arena.slot_sizes:
            if size not in sizes_in_use:
                for slab in self.arena.slabs_of(size):
                    if not slab.used:
                        self.arena.uncut(slab)

    def commit(
        self, space: Space, owner: bytes, parent_hash: bytes, chunks: Sequence[tuple[bytes, tuple[int, int]]]
    ) -> bytes:
        """`chunks` are (hash, slot name) of one prefix in order; -> one `Outcome` for each."""
        outcomes = bytearray()
        for hash_, name in chunks:
            outcomes.append(self._commit_one(space, owner, parent_hash, hash_, name))
            parent_hash = hash_
        return bytes(outcomes)

    def _commit_one(
        self, space: Space, owner: bytes, parent_hash: bytes, hash_: bytes, name: tuple[int, int]
    ) -> int:
        generation, number = name
        if not self.arena.owns(owner, *name) or self.arena.slab_of(number).slot_bytes != space.slot_bytes:
            return Outcome.FOREIGN
        slot = SlotRef(self.arena.offset(number), generation, number)
        chunk = self.index.admit(space, hash_, parent_hash, slot)
        if isinstance(chunk, Admission):
            self.arena.abort(owner, number)
            return Outcome.EXISTS if chunk is Admission.EXISTS else Outcome.ORPHAN
        key = Key(space.prefix, space.group, space.window, hash_)
        self.arena.commit(owner, slot, key, chunk.parent.slot if chunk.parent else None)
        return Outcome.STORED

    def abort(self, owner: bytes, names: Sequence[tuple[int, int]]) -> int:
        mine = [name for name in dict.fromkeys(names) if self.arena.owns(owner, *name)]
        for _, number in mine:
            self.arena.abort(owner, number)
        return len(mine)

    def abort_all(self, owner: bytes, but: Sequence[tuple[int, int]] = ()) -> int:
        """All that the owner has reserved, `but` these: it holds nothing else, or it is dead."""
        kept = set(but)
        reserved = self.arena.reserved.get(owner, {}).items()
        names = [(generation, number) for number, generation in reserved]
        return self.abort(owner, [name for name in names if name not in kept])

    def clear(self, spaces: Sequence[Space]) -> int:
        """Drops all chunks of these spaces, also leased ones: their readers will see the change."""
        count = 0
        for space in spaces:
            roots = [chunk for chunk in space.chunks.values() if chunk.parent is None]
            count += self._drop(self.index.family(roots))
        return count

    def _make_room(self, slot_bytes: int, missing: int, sizes_in_use: Sequence[int]) -> bool:
        taken = self._slabs_to_take(slot_bytes, missing, sizes_in_use)
        missing -= len(taken) * self.arena.slots_per_slab(slot_bytes)
        if missing > 0:
            leaving = self.index.evict(slot_bytes, missing, self._handover.makes_room)
            if leaving is None:
                return False
            for chunk in leaving:
                self.arena.free(chunk.slot)
            self.evicted += len(leaving)
        for slab, chunks in taken:
            self.evicted += self._drop([chunk for chunk in chunks if chunk.stored])
            self.arena.uncut(slab)
        return True

    def _slabs_to_take(
        self, slot_bytes: int, missing: int, sizes_in_use: Sequence[int]
    ) -> list[tuple[Slab, Sequence[Chunk]]]:
        """Slabs of other sizes: empty ones, then the coldest of those who have more than their share."""
        wanted = -(-missing // self.arena.slots_per_slab(slot_bytes))
        others = [size for size in self.arena.slot_sizes if size != slot_bytes]
        empty = [slab for size in others for slab in self.arena.slabs_of(size) if not slab.used]
        taken: list[tuple[Slab, Sequence[Chunk]]] = [(slab, ()) for slab in empty[:wanted]]
        share = self.arena.geometry.slabs // len({slot_bytes, *sizes_in_use})
        wanted = min(wanted, share - len(self.arena.slabs_of(slot_bytes)))
        for size in others:
            kept = len(self.arena.slabs_of(size)) - sum(slab.slot_bytes == size for slab, _ in taken)
            surplus = kept - (share if size in sizes_in_use else 0)
            if surplus > 0 and len(taken) < wanted:
                taken += self._handover.give_up(size, min(surplus, wanted - len(taken)))
        return taken

    def _drop(self, roots: Sequence[Chunk]) -> int:
        family = self.index.family(roots)
        self.index.drop(family)
        for chunk in family:
            self.arena.free(chunk.slot)
        return len(family)

    def _restore(self) -> None:
        """Builds the index from what earlier owners of the arena committed, parents first."""
        inherited, self.arena.inherited = self.arena.inherited, []
        waiting = {(entry.generation, number): entry for number, entry in inherited}
        ages = {name: age for age, name in enumerate(sorted(waiting), 1)}  # policies measure with them
        restored: dict[tuple[int, int], Chunk] = {}
        for name in ages:
            line: list[tuple[tuple[int, int], Entry]] = []  # it and its ancestors that still wait
            while (entry := waiting.pop(name, None)) is not None:
                line.append((name, entry))
                name = (entry.parent_generation, entry.parent_number)  # noqa: PLW2901
            for descendant, entry in reversed(line):
                chunk = self._restore_one(descendant, entry, restored, ages[descendant])
                if chunk is not None:
                    restored[descendant] = chunk
        self.restored = len(restored)

    def _restore_one(
        self, name: tuple[int, int], entry: Entry, restored: dict[tuple[int, int], Chunk], age: int
    ) -> Chunk | None:
        generation, number = name
        slot = SlotRef(self.arena.offset(number), generation, number)
        space = self.index.space(entry.prefix, entry.group, entry.length, entry.window)
        parent = restored.get((entry.parent_generation, entry.parent_number))
        orphan = entry.parent_number != NO_NUMBER and parent is None
        if orphan or entry.hash in space.chunks or is_canary(entry.prefix):
            self.arena.free(slot)
            return None
        return self.index.adopt(space, entry.hash, parent, slot, age)
