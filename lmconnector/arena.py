"""The server's arena, mapped into this process."""

import mmap
import os

import torch

from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef
from cache_server.protocol.slots import FormatError, holds, read_header
from lmconnector.errors import RegistrationError


class ArenaMap:
    """It stays valid when the server dies, and also when the file is removed: only its slots' state says
    whether the bytes are worth anything."""

    def __init__(self, arena: m.Arena) -> None:
        self.id = arena.id
        try:
            fd = os.open(arena.path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RegistrationError(f"arena {arena.path}: {error.strerror}") from error
        try:
            self._map = mmap.mmap(fd, arena.file_bytes)
            self._view = memoryview(self._map)
            self._geometry, arena_id = read_header(self._view)
        except (OSError, ValueError, FormatError) as error:
            raise RegistrationError(f"arena {arena.path}: {error}") from error
        finally:
            os.close(fd)
        if arena_id != arena.id:
            raise RegistrationError(f"arena {arena.path} is not the one that the server announced")
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def holds(self, slot: SlotRef, hash_: bytes) -> bool:
        return holds(self._view, self._geometry, slot, hash_)
