"""The least an engine is: one process that registers, stores chunks and loads them again.

Probes, demonstrations and tests do their real work with it, over the real socket and the real arena.
"""

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from cache_server.client import Client
from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef, pack_slot_names, split_slot_refs
from cache_server.protocol.presence import Presence, presence_name
from cache_server.protocol.slots import FormatError, holds, read_header


class StaleError(Exception):
    """A slot no longer held what LOOKUP had promised; what was read is worth nothing."""


class Kind(msgspec.Struct, frozen=True):
    """How a session differs from an ordinary engine's."""

    window: int = 0
    features: tuple[str, ...] = ()
    timeout_ms: int = 2_000


ORDINARY = Kind()


class Session:
    def __init__(
        self,
        runtime_dir: Path,
        engine: str,
        part_bytes: int,
        namespace: bytes = b"session",
        kind: Kind = ORDINARY,
    ) -> None:
        self.client = Client(runtime_dir, kind.timeout_ms)
        self.engine = engine
        self._kind = kind
        self._namespace = namespace
        self._presence = Presence(runtime_dir, presence_name(engine))
        self._part_bytes = part_bytes
        self._map: mmap.mmap | None = None
        try:
            self.register()
        except BaseException:
            self.abandon()
            raise

    def register(self) -> None:
        """Again after the server has started anew."""
        registered = self.client.ask(
            m.Register(
                id=self.client.next_id(),
                version_min=m.VERSION_MIN,
                version_max=m.VERSION_MAX,
                engine=self.engine,
                features=self._kind.features,
                role="worker",
                namespace=self._namespace,
                proof=self._presence.name,
                pid=os.getpid(),
                phase="ready",
                layout=m.Layout(groups=(m.Group(self._part_bytes, self._kind.window),)),
            ),
            m.Registered,
        )
        self.session = registered.session
        self.boot = registered.boot
        self._attach(registered.arena)

    def clear(self) -> int:
        """Drops what its namespace holds; -> how many chunks"""
        clear = m.Clear(id=self.client.next_id(), session=self.session)
        return self.client.ask(clear, m.Done).count

    def unregister(self) -> None:
        self.client.ask(m.Unregister(id=self.client.next_id(), session=self.session), m.Done)

    def close(self) -> None:
        """Leaves as a process does that ends in good order."""
        try:
            self.unregister()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Leaves without a word."""
        self.client.close()
        self._presence.close()

    def ping(self) -> m.Pong:
        return self.client.ask(m.Ping(id=self.client.next_id(), session=self.session), m.Pong)

    def reserve(self, count: int) -> list[SlotRef]:
        request = m.Reserve(id=self.client.next_id(), session=self.session, count=count)
        return split_slot_refs(self.client.ask(request, m.Reserved).slots)

    def write(self, slot: SlotRef, content: bytes, first: int = 0) -> None:
        self._view[slot.offset + first : slot.offset + first + len(content)] = content

    def commit(self, hashes: Sequence[bytes], slots: Sequence[SlotRef], parent: bytes = b"") -> bytes:
        request = m.Commit(
            id=self.client.next_id(),
            session=self.session,
            parent=parent,
            hashes=b"".join(hashes),
            slots=pack_slot_names(slots),
        )
        return self.client.ask(request, m.Committed).outcomes

    def abort(self, slots: Sequence[SlotRef]) -> int:
        request = m.Abort(id=self.client.next_id(), session=self.session, slots=pack_slot_names(slots))
        return self.client.ask(request, m.Done).count

    def abort_all(self) -> int:
        request = m.Abort(id=self.client.next_id(), session=self.session, slots=b"", all_but=True)
        return self.client.ask(request, m.Done).count

    def store(self, hashes: Sequence[bytes], contents: Sequence[bytes], parent: bytes = b"") -> bytes:
        """-> an `Outcome` for each chunk"""
        slots = self.reserve(len(hashes))
        for slot, content in zip(slots, contents, strict=True):
            self.write(slot, content)
        return self.commit(hashes, slots, parent)

    def lookup(self, request: str, hashes: Sequence[bytes]) -> list[SlotRef]:
        """The slots of the longest stored prefix, under a lease of that name."""
        lookup = m.Lookup(
            id=self.client.next_id(), session=self.session, request=request, hashes=b"".join(hashes)
        )
        found = self.client.ask(lookup, m.Found)
        return split_slot_refs(found.groups[0].slots) if found.chunks else []

    def release(self, *requests: str) -> int:
        request = m.Release(id=self.client.next_id(), session=self.session, requests=requests)
        return self.client.ask(request, m.Done).count

    def read(self, slot: SlotRef, hash_: bytes, first: int = 0, count: int | None = None) -> bytes:
        """`count` bytes from `first` on, without it all there are."""
        if not holds(self._view, self._geometry, slot, hash_):
            raise StaleError(f"slot {slot.number} before reading")
        end = self._part_bytes if count is None else first + count
        content = bytes(self._view[slot.offset + first : slot.offset + end])
        if not holds(self._view, self._geometry, slot, hash_):
            raise StaleError(f"slot {slot.number} after reading")
        return content

    def load(self, hashes: Sequence[bytes]) -> list[bytes]:
        """The contents of the longest stored prefix."""
        request = f"load-{self.client.next_id()}"
        try:
            slots = self.lookup(request, hashes)
            return [self.read(slot, hash_) for slot, hash_ in zip(slots, hashes, strict=False)]
        finally:
            self.release(request)

    def _attach(self, arena: m.Arena) -> None:
        """Maps the file that the server serves, and makes sure that it is that one."""
        fd = os.open(arena.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._map = mmap.mmap(fd, arena.file_bytes)
        finally:
            os.close(fd)
        self._view = memoryview(self._map)
        self._geometry, arena_id = read_header(self._view)
        if arena_id != arena.id:
            raise FormatError(f"{arena.path} is not the arena that the server announced")
