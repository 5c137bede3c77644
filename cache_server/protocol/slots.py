"""The arena file: its header, slab records, slot entries and where they lie.

    0          header: magic, version, id, sizes            written once
    4096       boots: how many servers have owned the file, and the last of them
    8192       slab records, 8 bytes each: RAW, POPULATED or the slot size the slab is cut into
    ...        slot entries, 128 bytes each, `entries_per_slab` for each slab
    data       slabs

The server alone writes all of this but the data; clients map the file and read entries.  A slot's generation
names one reservation of it and is never given out twice, over every restart: a reader that finds the entry
COMMITTED under the generation it was told, both before its first byte and after its last, has read what was
committed under that generation.
"""

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

from cache_server.protocol.keys import HASH_BYTES, OWNER_BYTES, PREFIX_BYTES, SlotRef

MAGIC = b"LMCARENA"
FORMAT_VERSION = 1
SLOT_ALIGN = 4096  # a page: what direct I/O and pinning want
DATA_ALIGN = 2 << 20  # a huge page
SLAB_BYTES_MAX = 1 << 30
HISTORY = 16

_HEADER = struct.Struct("<8sI4x16sQQI")  # magic, version, id, capacity, slab bytes, crc of all before
_BOOTS = struct.Struct("@Q")
_BOOT = struct.Struct("<QQ")  # boot id, wall clock in seconds
BOOTS_AT = 4096
SLABS_AT = 8192

SLAB_RAW = 0
SLAB_POPULATED = 1  # any greater value: the size of its slots

NO_NUMBER = 0xFFFF_FFFF

Buffer = memoryview


class SlotState(IntEnum):
    FREE = 0
    RESERVED = 1
    COMMITTED = 2


class Entry(NamedTuple):
    state: int
    group: int
    window: int  # of that group
    parent_number: int
    parent_generation: int
    generation: int
    offset: int
    length: int
    owner: bytes  # digest of the engine that reserved it
    prefix: bytes
    hash: bytes


_ENTRY = struct.Struct(f"<BBHIQQQQ{OWNER_BYTES}s{PREFIX_BYTES}s{HASH_BYTES}s20x")
ENTRY_BYTES = _ENTRY.size + 4
_ENTRY_CHECK = struct.Struct("<I")
_UNUSED = bytes(ENTRY_BYTES)
assert ENTRY_BYTES == 128


def align(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Geometry:
    """Where things lie in an arena of `capacity_bytes`; the same for everybody who knows that number."""

    capacity_bytes: int
    slab_bytes: int

    @classmethod
    def of(cls, capacity_bytes: int) -> "Geometry":
        """Slabs are a 32nd of the arena, 1 GiB at most: the unit in which models take space from each other,
        in which fresh memory becomes usable, and the largest slot."""
        slab_bytes = min(SLAB_BYTES_MAX, align(-(-capacity_bytes // 32), DATA_ALIGN))
        return cls(align(capacity_bytes, slab_bytes), slab_bytes)

    @cached_property
    def slabs(self) -> int:
        return self.capacity_bytes // self.slab_bytes

    @cached_property
    def entries_per_slab(self) -> int:
        return self.slab_bytes // SLOT_ALIGN

    @cached_property
    def entries_bytes(self) -> int:
        """Of one slab's entries, however many of them it needs."""
        return ENTRY_BYTES * self.entries_per_slab

    @cached_property
    def table_at(self) -> int:
        return SLABS_AT + align(8 * self.slabs, 4096)

    @cached_property
    def data_at(self) -> int:
        return align(self.table_at + self.slabs * self.entries_bytes, DATA_ALIGN)

    @property
    def file_bytes(self) -> int:
        return self.data_at + self.capacity_bytes

    def entry_at(self, number: int) -> int:
        return self.table_at + ENTRY_BYTES * number

    def slab_at(self, slab: int) -> int:
        return self.data_at + slab * self.slab_bytes

    def slab_record_at(self, slab: int) -> int:
        return SLABS_AT + 8 * slab


class FormatError(ValueError):
    """The file is no arena this code can use; the message says why."""


def write_header(buffer: Buffer, geometry: Geometry, arena_id: bytes) -> None:
    fields = (MAGIC, FORMAT_VERSION, arena_id, geometry.capacity_bytes, geometry.slab_bytes)
    body = _HEADER.pack(*fields, 0)[:-4]
    _HEADER.pack_into(buffer, 0, *fields, zlib.crc32(body))


def read_header(buffer: Buffer | bytes, *, any_version: bool = False) -> tuple[Geometry, bytes]:
    """-> the geometry and the arena's id"""
    if len(buffer) < _HEADER.size:
        raise FormatError(f"the file has {len(buffer)} bytes, too few for a header")
    magic, version, arena_id, capacity, slab_bytes, crc = _HEADER.unpack_from(buffer)
    if magic != MAGIC:
        raise FormatError(f"the file begins with {magic!r}, expected {MAGIC!r}")
    if version != FORMAT_VERSION and not any_version:
        raise FormatError(f"format version {version}, this code writes and reads {FORMAT_VERSION}")
    if crc != zlib.crc32(bytes(buffer[: _HEADER.size - 4])):
        raise FormatError("the header's check word is wrong")
    return Geometry(capacity, slab_bytes), arena_id


def record_boot(buffer: Buffer, boot: int, wall_s: int) -> int:
    """Enters a new owner; -> how many there have been, itself included."""
    (boots,) = _BOOTS.unpack_from(buffer, BOOTS_AT)
    _BOOT.pack_into(buffer, BOOTS_AT + 8 + _BOOT.size * (boots % HISTORY), boot, wall_s)
    _BOOTS.pack_into(buffer, BOOTS_AT, boots + 1)  # a native store: whole or not at all
    return int(boots) + 1


def read_boots(buffer: Buffer) -> tuple[int, list[tuple[int, int]]]:
    """-> how many boots, and (boot, wall clock s) of the last ones, oldest first"""
    (boots,) = _BOOTS.unpack_from(buffer, BOOTS_AT)
    at = BOOTS_AT + 8
    return boots, [
        _BOOT.unpack_from(buffer, at + _BOOT.size * (number % HISTORY))
        for number in range(max(0, boots - HISTORY), boots)
    ]


def write_slab(buffer: Buffer, geometry: Geometry, slab: int, record: int) -> None:
    _BOOTS.pack_into(buffer, geometry.slab_record_at(slab), record)


def read_slab(buffer: Buffer, geometry: Geometry, slab: int) -> int:
    (record,) = _BOOTS.unpack_from(buffer, geometry.slab_record_at(slab))
    return int(record)


def clear_tables(buffer: Buffer, geometry: Geometry) -> None:
    """From now on nobody takes the arena over, and no slot of it holds anything.  Only what has memory is
    written to: a write to a page that can't be had kills the process."""
    populated = [slab for slab in range(geometry.slabs) if read_slab(buffer, geometry, slab) != SLAB_RAW]
    buffer[:BOOTS_AT] = MAGIC.ljust(BOOTS_AT, b"\0")  # first: nobody is to take over a half-cleared one
    buffer[BOOTS_AT : geometry.table_at] = bytes(geometry.table_at - BOOTS_AT)
    blank = bytes(geometry.entries_bytes)
    for slab in populated:
        at = geometry.entry_at(slab * geometry.entries_per_slab)
        buffer[at : at + len(blank)] = blank


def write_entry(buffer: Buffer, geometry: Geometry, number: int, entry: Entry) -> None:
    body = _ENTRY.pack(*entry)
    at = geometry.entry_at(number)
    buffer[at : at + ENTRY_BYTES] = body + _ENTRY_CHECK.pack(zlib.crc32(body, number))


def read_entry(buffer: Buffer, geometry: Geometry, number: int) -> Entry | None:
    """None: never used, or half-written by a server that was killed."""
    at = geometry.entry_at(number)
    raw = bytes(buffer[at : at + ENTRY_BYTES])
    if raw == _UNUSED:
        return None
    (check,) = _ENTRY_CHECK.unpack_from(raw, _ENTRY.size)
    if check != zlib.crc32(raw[: _ENTRY.size], number):
        return None
    return Entry(*_ENTRY.unpack_from(raw))


def is_blank(buffer: Buffer, geometry: Geometry, number: int) -> bool:
    at = geometry.entry_at(number)
    return buffer[at : at + ENTRY_BYTES] == _UNUSED


def holds(buffer: Buffer, geometry: Geometry, slot: SlotRef, hash_: bytes) -> bool:
    """Whether the slot holds what LOOKUP said; asked before the first byte is read and after the last."""
    entry = read_entry(buffer, geometry, slot.number)
    return (
        entry is not None
        and entry.state == SlotState.COMMITTED
        and (entry.generation, entry.offset, entry.hash) == (slot.generation, slot.offset, hash_)
    )
