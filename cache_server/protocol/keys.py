"""Keys and slot references, as they are packed on the wire.

A key is (prefix, group, hash).  `hash` is the engine's own hash of the chunk's last block, which chains over
everything before it; `prefix` stands for all the hash does not cover and is made by the server, so that two
engines whose chunks differ in as much as one part's length can never share a key.
"""

import struct
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import NamedTuple, overload

HASH_BYTES = 32
PREFIX_BYTES = 16
OWNER_BYTES = 16
NO_PARENT = b""
_CANARY = b"canary\0\0"


class SlotRef(NamedTuple):
    """Where a chunk lies: `offset` into the arena file, `number` of its entry in the slot table."""

    offset: int
    generation: int
    number: int


SLOT_REF = struct.Struct("<QQI")
_SLOT_NAME = struct.Struct("<QI")  # (generation, number): names one reservation of one slot
SLOT_NAME_BYTES = _SLOT_NAME.size


def key_prefix(namespace: bytes, epoch: int, geometry: Sequence[Sequence[int]]) -> bytes:
    """`geometry` is, per cache group, the bytes of each part of a chunk and the group's window."""
    digest = blake2b(digest_size=PREFIX_BYTES)
    digest.update(struct.pack("<IQI", len(namespace), epoch, len(geometry)))
    digest.update(namespace)
    for numbers in geometry:
        digest.update(struct.pack(f"<I{len(numbers)}Q", len(numbers), *numbers))
    return digest.digest()


def canary_prefix(prefix: bytes) -> bytes:
    """Told apart in the slot table too: what a canary leaves behind there is no chunk of anybody."""
    return _CANARY + prefix[len(_CANARY) :]


def is_canary(prefix: bytes) -> bool:
    return prefix.startswith(_CANARY)


def owner_of(engine: str) -> bytes:
    """Stands for the engine in slot entries and, in hex, in its processes' presence files' names."""
    return blake2b(engine.encode(), digest_size=OWNER_BYTES).digest()


class Hashes(Sequence[bytes]):
    """A packed list, cut where it is looked at: of many a search looks at few."""

    def __init__(self, packed: bytes) -> None:
        self._packed = packed

    def __len__(self) -> int:
        return len(self._packed) // HASH_BYTES

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[bytes]: ...  # type: ignore[explicit-any]
    def __getitem__(self, at: int | slice) -> bytes | Sequence[bytes]:  # type: ignore[explicit-any]
        if isinstance(at, slice):
            return [self[one] for one in range(len(self))[at]]
        begin = at * HASH_BYTES
        if not 0 <= begin < len(self._packed):
            begin = range(len(self))[at] * HASH_BYTES
        return self._packed[begin : begin + HASH_BYTES]


def pack_slot_names(refs: Iterable[SlotRef]) -> bytes:
    return b"".join(_SLOT_NAME.pack(ref.generation, ref.number) for ref in refs)


def split_slot_names(packed: bytes) -> list[tuple[int, int]]:
    """-> (generation, number) of each"""
    return list(_SLOT_NAME.iter_unpack(packed))


def split_slot_refs(packed: bytes) -> list[SlotRef]:
    return [SlotRef(*fields) for fields in SLOT_REF.iter_unpack(packed)]
