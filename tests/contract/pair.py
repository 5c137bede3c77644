"""A client and a service joined in memory: every message between them is bytes, decoded by the other side."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec

from cache_server import report
from cache_server.limits import Limits
from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError, decode_reply, decode_request, encode
from cache_server.protocol.keys import SlotRef, owner_of, pack_slot_names, split_slot_refs
from cache_server.protocol.slots import holds
from kit import KIB, World

R = TypeVar("R", bound=m.Reply)


class Pair:
    def __init__(self, world: World) -> None:
        self.world = world
        self.processes = itertools.count(1)

    @property
    def service(self):
        return self.world.service

    def answer(self, data: bytes) -> bytes:
        """What the server's loop does with one frame."""
        try:
            request = decode_request(data)
            if isinstance(request, m.Status):
                return encode(self._status(request))
            return encode(self.service.handle(request, self.world.now_ms))
        except ProtocolError as error:
            return encode(self.service.refuse(error.id, error.code, error.detail))

    def send(self, data: bytes) -> m.Reply:
        reply = decode_reply(self.answer(data))
        assert reply.boot == self.service.boot, "every reply tells who answered"
        return reply

    def ask(self, request: m.Request) -> m.Reply:
        reply = self.send(encode(request))
        assert reply.id == request.id
        return reply

    def expect(self, request: m.Request, expected: type[R]) -> R:
        reply = self.ask(request)
        assert isinstance(reply, expected), reply
        return reply

    def state(self) -> tuple[dict, bytes]:
        """All that a refusal leaves as it was: what is reported, but how many were refused, and the table."""
        status = msgspec.to_builtins(report.describe(self.service, self.world.now_ms, 1, 0, ""))
        del status["refused"]
        return status, bytes(self.world.file[: self.world.geometry.data_at])

    def limit(self, **limits: int) -> None:
        self.service.limits = replace(self.service.limits, **limits)

    def _status(self, request: m.Status) -> m.StatusReply:
        status = report.describe(self.service, self.world.now_ms, 1, 0, "")
        if request.workers:
            rows = report.worker_rows(self.service, self.world.now_ms)
            status = msgspec.structs.replace(status, worker_rows=rows)
        return m.StatusReply(id=request.id, boot=self.service.boot, status=msgspec.to_builtins(status))


class WiredPeer:
    """One worker of an engine, which writes and reads the arena's bytes itself."""

    def __init__(
        self, pair: Pair, name: str = "engine", part_bytes: int = 4 * KIB, rank: int = 0, ranks: int = 1
    ) -> None:
        self.pair = pair
        self.name = name
        self.part_bytes = part_bytes
        self.proof = f"{owner_of(name).hex()}.{next(pair.processes)}"
        pair.world.locked.add(self.proof)
        self.registration = m.Register(
            id=1,
            version_min=m.VERSION_MIN,
            version_max=m.VERSION_MAX,
            engine=name,
            role="worker",
            rank=rank,
            world=ranks,
            namespace=b"model",
            proof=self.proof,
            phase="ready",
            layout=m.Layout(groups=(m.Group(part_bytes),), part=rank, parts=ranks),
        )
        self._ids = itertools.count(1)
        self.session = 0

    @property
    def id(self) -> int:
        return next(self._ids)

    def register(self) -> "WiredPeer":
        self.session = self.pair.expect(self.registration, m.Registered).session
        return self

    def die(self) -> None:
        self.pair.world.locked.remove(self.proof)

    def ping(self) -> m.Pong:
        return self.pair.expect(m.Ping(id=self.id, session=self.session), m.Pong)

    def reserve(self, count: int) -> list[SlotRef]:
        request = m.Reserve(id=self.id, session=self.session, count=count)
        return split_slot_refs(self.pair.expect(request, m.Reserved).slots)

    def write(self, slot: SlotRef, content: bytes) -> None:
        self.pair.world.file[slot.offset : slot.offset + len(content)] = content

    def commit(self, hashes: Sequence[bytes], slots: Sequence[SlotRef], parent: bytes = b"") -> bytes:
        return self.pair.expect(
            m.Commit(
                id=self.id,
                session=self.session,
                hashes=b"".join(hashes),
                slots=pack_slot_names(slots),
                parent=parent,
            ),
            m.Committed,
        ).outcomes

    def abort(self, slots: Sequence[SlotRef]) -> int:
        return self.pair.expect(
            m.Abort(id=self.id, session=self.session, slots=pack_slot_names(slots)), m.Done
        ).count

    def store(self, hashes: Sequence[bytes], parent: bytes = b"") -> list[SlotRef]:
        """Each chunk's content is made from its hash."""
        slots = self.reserve(len(hashes))
        for slot, hash_ in zip(slots, hashes, strict=True):
            self.write(slot, content_of(hash_, self.part_bytes))
        assert self.commit(hashes, slots, parent) == bytes([m.Outcome.STORED] * len(hashes))
        return slots

    def lookup(self, hashes: Sequence[bytes], request: str = "request") -> m.Found:
        return self.pair.expect(
            m.Lookup(id=self.id, session=self.session, request=request, hashes=b"".join(hashes)), m.Found
        )

    def load(self, hashes: Sequence[bytes], request: str = "request") -> list[bytes]:
        found = self.lookup(hashes, request)
        slots = split_slot_refs(found.groups[0].slots) if found.chunks else []
        return [self.read(slot, hash_) for slot, hash_ in zip(slots, hashes, strict=False)]

    def read(self, slot: SlotRef, hash_: bytes) -> bytes:
        file, geometry = self.pair.world.file, self.pair.world.geometry
        assert holds(file, geometry, slot, hash_)
        content = bytes(file[slot.offset : slot.offset + self.part_bytes])
        assert holds(file, geometry, slot, hash_)
        return content

    def release(self, *requests: str) -> int:
        return self.pair.expect(m.Release(id=self.id, session=self.session, requests=requests), m.Done).count

    def clear(self) -> int:
        return self.pair.expect(m.Clear(id=self.id, session=self.session), m.Done).count

    def unregister(self) -> None:
        self.pair.expect(m.Unregister(id=self.id, session=self.session), m.Done)


def content_of(hash_: bytes, part_bytes: int) -> bytes:
    return (hash_ * (part_bytes // len(hash_) + 1))[:part_bytes]


def new_pair(*, populated: bool = True, **limits: int) -> Pair:
    return Pair(World(limits=Limits(**limits), populated=populated))
