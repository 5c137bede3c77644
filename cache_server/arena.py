"""The allocator: which slot of the arena is free, reserved by whom, or committed.

It works on the slot table in a buffer that is handed in, and writes every change there before anybody can
hear of it: what a killed server leaves behind is a table from which the next one goes on.

The arena is cut into slabs, a slab into slots of one size.  A slab gets its size with the first reservation
that needs it and gives it up when it is empty and another size wants it: so mixed sizes never fragment.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from cache_server.protocol.keys import HASH_BYTES, OWNER_BYTES, PREFIX_BYTES, SlotRef
from cache_server.protocol.slots import (
    NO_NUMBER,
    SLAB_POPULATED,
    SLAB_RAW,
    SLOT_ALIGN,
    Buffer,
    Entry,
    Geometry,
    SlotState,
    is_blank,
    read_entry,
    read_slab,
    write_entry,
    write_slab,
)

GENERATIONS_PER_BOOT = 1 << 40
NOBODY = bytes(OWNER_BYTES)


class Key(NamedTuple):
    prefix: bytes
    group: int
    window: int
    hash: bytes


NO_KEY = Key(bytes(PREFIX_BYTES), 0, 0, bytes(HASH_BYTES))


@dataclass(slots=True)
class Slab:
    number: int
    slot_bytes: int = 0  # 0: not cut into slots
    free: list[int] = field(default_factory=list)
    used: int = 0
    reserved: int = 0  # of the used ones
    closed: bool = False  # nothing is reserved in it: it is to become empty
    last_use: int = 0  # by the index's clock; what was learned when it was to become empty, and did not


@dataclass(frozen=True, slots=True)
class Usage:
    """Every byte of the arena is in exactly one of these."""

    capacity: int
    unpopulated: int
    free: int
    reserved: int
    committed: int
    waste: int  # the ends of slabs, too short for a slot


class Arena:
    def __init__(self, table: Buffer, geometry: Geometry, boots: int) -> None:
        """Takes over what the table says; `boots` is the number of this owner, which dates generations."""
        self.geometry = geometry
        self.reserved: dict[bytes, dict[int, int]] = {}  # owner -> slot number -> generation
        self._table = table
        self.inherited: list[tuple[int, Entry]] = []  # committed under earlier owners: slot number, entry
        self.population_failed = False
        self._last_generation = boots * GENERATIONS_PER_BOOT
        self._slabs = [Slab(number) for number in range(geometry.slabs)]
        self._raw: dict[int, None] = {}
        self._uncut: dict[int, None] = {}  # populated slabs without a slot size
        self._by_size: dict[int, dict[int, None]] = {}  # slot size -> its slabs
        self._committed_bytes = 0
        self._reserved_bytes: Counter[bytes] = Counter()  # by owner
        for slab in self._slabs:
            self._adopt(slab)

    @property
    def raw_slabs(self) -> list[int]:
        """Not to be used before `populated` is said of them."""
        return list(self._raw)

    @property
    def slot_bytes_max(self) -> int:
        return self.geometry.slab_bytes

    def populated(self, slab: int) -> None:
        del self._raw[slab]
        write_slab(self._table, self.geometry, slab, SLAB_POPULATED)
        self._uncut[slab] = None

    @property
    def populating(self) -> bool:
        """More room is on its way: worth waiting for rather than evicting."""
        return bool(self._raw) and not self.population_failed

    def slots_per_slab(self, slot_bytes: int) -> int:
        return self.geometry.slab_bytes // slot_bytes

    def slabs_of(self, slot_bytes: int) -> list[Slab]:
        return [self._slabs[number] for number in self._by_size.get(slot_bytes, ())]

    def numbers(self, slab: Slab) -> range:
        """Of its slots."""
        first = slab.number * self.geometry.entries_per_slab
        return range(first, first + self.slots_per_slab(slab.slot_bytes))

    def entry(self, number: int) -> Entry | None:
        return read_entry(self._table, self.geometry, number)

    @property
    def slot_sizes(self) -> list[int]:
        return list(self._by_size)

    def slab_of(self, number: int) -> Slab:
        return self._slabs[number // self.geometry.entries_per_slab]

    def offset(self, number: int) -> int:
        slab = self.slab_of(number)
        within = number % self.geometry.entries_per_slab
        return self.geometry.slab_at(slab.number) + within * slab.slot_bytes

    def available(self, slot_bytes: int) -> int:
        """How many slots can be reserved without taking any from anybody."""
        cut = sum(len(slab.free) for slab in self._open_slabs_of(slot_bytes))
        return cut + len(self._uncut) * self.slots_per_slab(slot_bytes)

    def reserve(self, slot_bytes: int, count: int, owner: bytes) -> list[SlotRef]:
        assert slot_bytes % SLOT_ALIGN == 0
        assert count <= self.available(slot_bytes), "make room first"
        refs: list[SlotRef] = []
        for slab in self._open_slabs_of(slot_bytes):
            self._reserve_in(slab, count - len(refs), owner, refs)
        while len(refs) < count:
            self._reserve_in(self._cut(slot_bytes), count - len(refs), owner, refs)
        return refs

    def commit(self, owner: bytes, slot: SlotRef, key: Key, parent: SlotRef | None) -> None:
        assert self.owns(owner, slot.generation, slot.number), "only its reserver commits a slot"
        self._unreserve(owner, slot.number)
        self._write(slot.number, SlotState.COMMITTED, slot.generation, owner, key, parent)
        self._committed_bytes += self.slab_of(slot.number).slot_bytes

    def owns(self, owner: bytes, generation: int, number: int) -> bool:
        return self.reserved.get(owner, {}).get(number) == generation

    def abort(self, owner: bytes, number: int) -> None:
        """A reservation ends unused; its owner has stopped writing."""
        self._free(number, self._unreserve(owner, number))

    def free(self, slot: SlotRef) -> None:
        """A committed slot ends."""
        self._committed_bytes -= self.slab_of(slot.number).slot_bytes
        self._free(slot.number, slot.generation)

    def uncut(self, slab: Slab) -> None:
        """An empty slab may take any size again."""
        assert not slab.used, "its slots are in use"
        write_slab(self._table, self.geometry, slab.number, SLAB_POPULATED)
        del self._by_size[slab.slot_bytes][slab.number]
        if not self._by_size[slab.slot_bytes]:
            del self._by_size[slab.slot_bytes]
        slab.slot_bytes, slab.free, slab.closed, slab.last_use = 0, [], False, 0
        self._uncut[slab.number] = None

    def reserved_bytes(self, owner: bytes) -> int:
        return self._reserved_bytes[owner]

    def all_reserved_bytes(self) -> int:
        return self._reserved_bytes.total()

    def usage(self) -> Usage:
        geometry = self.geometry
        free = len(self._uncut) * geometry.slab_bytes
        waste = 0
        for slabs in self._by_size.values():
            for number in slabs:
                slab = self._slabs[number]
                free += len(slab.free) * slab.slot_bytes
                waste += geometry.slab_bytes % slab.slot_bytes
        return Usage(
            capacity=geometry.capacity_bytes,
            unpopulated=len(self._raw) * geometry.slab_bytes,
            free=free,
            reserved=self.all_reserved_bytes(),
            committed=self._committed_bytes,
            waste=waste,
        )

    def _open_slabs_of(self, slot_bytes: int) -> list[Slab]:
        return [slab for slab in self.slabs_of(slot_bytes) if not slab.closed]

    def _adopt(self, slab: Slab) -> None:
        record = read_slab(self._table, self.geometry, slab.number)
        if record == SLAB_RAW:
            self._raw[slab.number] = None
        elif record == SLAB_POPULATED:
            self._uncut[slab.number] = None
        else:
            self._adopt_slots(slab, record)

    def _adopt_slots(self, slab: Slab, slot_bytes: int) -> None:
        slab.slot_bytes = slot_bytes
        self._by_size.setdefault(slot_bytes, {})[slab.number] = None
        for number in self.numbers(slab):
            entry = self.entry(number)
            if entry is None and not is_blank(self._table, self.geometry, number):
                # Torn.  Made whole at once, or a second tear could bring back what was before the first.
                self._write(number, SlotState.FREE, self._last_generation, NOBODY)
            if entry is None or entry.state == SlotState.FREE or entry.length != slot_bytes:
                slab.free.append(number)
                continue
            slab.used += 1
            if entry.state == SlotState.COMMITTED:
                self._committed_bytes += slot_bytes
                self.inherited.append((number, entry))
            else:
                slab.reserved += 1
                self.reserved.setdefault(entry.owner, {})[number] = entry.generation
                self._reserved_bytes[entry.owner] += slot_bytes
        slab.free.reverse()  # the lowest number goes out first

    def _cut(self, slot_bytes: int) -> Slab:
        slab = self._slabs[next(iter(self._uncut))]
        del self._uncut[slab.number]
        slab.slot_bytes = slot_bytes
        slab.free = list(reversed(self.numbers(slab)))
        self._by_size.setdefault(slot_bytes, {})[slab.number] = None
        write_slab(self._table, self.geometry, slab.number, slot_bytes)
        return slab

    def _reserve_in(self, slab: Slab, count: int, owner: bytes, refs: list[SlotRef]) -> None:
        mine = self.reserved.setdefault(owner, {})
        taken = min(count, len(slab.free))
        self._reserved_bytes[owner] += taken * slab.slot_bytes
        for _ in range(taken):
            number = slab.free.pop()
            slab.used += 1
            slab.reserved += 1
            self._last_generation += 1
            generation = self._last_generation
            mine[number] = generation
            self._write(number, SlotState.RESERVED, generation, owner)
            refs.append(SlotRef(self.offset(number), generation, number))

    def _unreserve(self, owner: bytes, number: int) -> int:
        mine = self.reserved[owner]
        generation = mine.pop(number)
        slab = self.slab_of(number)
        slab.reserved -= 1
        self._reserved_bytes[owner] -= slab.slot_bytes
        if not mine:
            del self.reserved[owner], self._reserved_bytes[owner]
        return generation

    def _free(self, number: int, generation: int) -> None:
        slab = self.slab_of(number)
        self._write(number, SlotState.FREE, generation, NOBODY)
        slab.used -= 1
        slab.free.append(number)

    def _write(
        self,
        number: int,
        state: SlotState,
        generation: int,
        owner: bytes,
        key: Key = NO_KEY,
        parent: SlotRef | None = None,
    ) -> None:
        entry = Entry(
            state=state,
            group=key.group,
            window=key.window,
            parent_number=parent.number if parent else NO_NUMBER,
            parent_generation=parent.generation if parent else 0,
            generation=generation,
            offset=self.offset(number),
            length=self.slab_of(number).slot_bytes,
            owner=owner,
            prefix=key.prefix,
            hash=key.hash,
        )
        write_entry(self._table, self.geometry, number, entry)
