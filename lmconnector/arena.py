"""The server's arena, mapped into this process."""

import mmap
import os

import torch

from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef
from cache_server.protocol.slots import (
    SLAB_RAW,
    FormatError,
    SlotState,
    holds,
    read_entry,
    read_header,
    read_slab,
)
from lmconnector.errors import RegistrationError


class ArenaMap:
    """It stays valid when the server dies, and also when the file is removed: only its slots' state says
    whether the bytes are worth anything."""

    def __init__(self, arena_id: bytes, view: memoryview, content: torch.Tensor) -> None:
        """`content`: the same bytes as in `view`."""
        self.id = arena_id
        self.bytes = content
        self._view = view
        self._geometry, found = read_header(view)
        if found != arena_id:
            raise FormatError("it is not the one that the server announced")
        self.data = content[self._geometry.data_at :]  # all slots, without the tables

    @classmethod
    def open(cls, arena: m.Arena) -> "ArenaMap":
        try:
            fd = os.open(arena.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RegistrationError(f"arena {arena.path}: {error.strerror}") from error
        try:
            mapped = mmap.mmap(fd, arena.file_bytes)
            return cls(arena.id, memoryview(mapped), torch.frombuffer(mapped, dtype=torch.uint8))
        except (OSError, ValueError) as error:  # a FormatError is one
            raise RegistrationError(f"arena {arena.path}: {error}") from error
        finally:
            os.close(fd)

    def populated(self, begin: int, end: int) -> bool:
        """Whether the server has filled these bytes of `data` with memory; before, no slot lies there."""
        slabs = range(begin // self._geometry.slab_bytes, -(-end // self._geometry.slab_bytes))
        return all(read_slab(self._view, self._geometry, slab) != SLAB_RAW for slab in slabs)

    def holds(self, slot: SlotRef, hash_: bytes) -> bool:
        return self._is_known(slot) and holds(self._view, self._geometry, slot, hash_)

    def is_reserved(self, slot: SlotRef) -> bool:
        """Whether it is to be written; whose it is, its holder knows."""
        entry = read_entry(self._view, self._geometry, slot.number) if self._is_known(slot) else None
        return (
            entry is not None
            and entry.state == SlotState.RESERVED
            and (entry.generation, entry.offset) == (slot.generation, slot.offset)
        )

    def _is_known(self, slot: SlotRef) -> bool:
        return slot.number < self._geometry.slabs * self._geometry.entries_per_slab
