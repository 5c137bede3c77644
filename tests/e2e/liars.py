"""A peer on the server's socket that is no server, or stands before one and twists what it says.

usage: liars.py RUNTIME_DIR LIE [RUNTIME_DIR_OF_AN_HONEST_SERVER]
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import zmq
from msgspec.structs import replace

from cache_server.protocol import messages as m
from cache_server.protocol.codec import decode_reply, decode_request, encode
from cache_server.protocol.keys import SLOT_REF, SlotRef, split_slot_refs
from cache_server.protocol.messages import Code
from cache_server.protocol.presence import SOCKET

BOOT = 9
FAR = 1 << 44
WITHOUT_LOOKUPS = "no answer to lookups"
WITHOUT_MEMORY = "forgets who asks"  # each time that it is believed again
Answer = Callable[[m.Request], list[bytes]]
Twist = Callable[[m.Reply], m.Reply | None]


def pong_to(ping: m.Ping, *, known: bool) -> bytes:
    pong = m.Pong(id=ping.id, boot=BOOT, seq=ping.seq, known=known, state="ready", progress=0, silence_ms=0)
    return encode(pong)


def alive_and_nothing_else(request: m.Request) -> list[bytes]:
    return [pong_to(request, known=True)] if isinstance(request, m.Ping) else []


def with_somebody_elses_arena(request: m.Request) -> list[bytes]:
    if isinstance(request, m.Ping):
        return [pong_to(request, known=True)]
    arena = m.Arena(
        path="/proc/self/exe", id=bytes(16), version=1, file_bytes=1 << 20, capacity_bytes=1 << 20
    )
    given = m.Registered(
        id=request.id, boot=BOOT, version=m.VERSION_MAX, features=(), session=1, arena=arena, lease_ms=30_000,
        silent_after_ms=5_000,
    )  # fmt: skip
    return [encode(given)]


ALONE: dict[str, Answer] = {
    "silence": lambda request: [],
    "garbage": lambda request: [b"HTTP/1.1 400 Bad Request", bytes(10_000)],
    "the request itself": lambda request: [encode(request)],
    "alive and nothing else": alive_and_nothing_else,
    "somebody else's arena": with_somebody_elses_arena,
}


def twisted(reply: m.Reply, twist: Callable[[list[SlotRef]], Sequence[SlotRef]]) -> m.Reply:
    """With other slots."""
    if isinstance(reply, m.Found):
        groups = [m.Part(part.first, packed(twist(split_slot_refs(part.slots)))) for part in reply.groups]
        return replace(reply, groups=tuple(groups))
    return reply


def packed(slots: Sequence[SlotRef]) -> bytes:
    return b"".join(SLOT_REF.pack(*slot) for slot in slots)


def more_than_was_asked_for(reply: m.Reply) -> m.Reply:
    if not isinstance(reply, m.Found) or not reply.chunks:
        return reply
    groups = tuple(m.Part(part.first, part.slots + part.slots[-SLOT_REF.size :] * 3) for part in reply.groups)
    return replace(reply, chunks=reply.chunks + 3, groups=groups)


def without_slots(reply: m.Reply) -> m.Reply:
    if not isinstance(reply, m.Found):
        return reply
    return replace(reply, groups=tuple(m.Part(reply.chunks, b"") for _ in reply.groups))


def of_another_model(reply: m.Reply) -> m.Reply:
    if not isinstance(reply, m.Found):
        return reply
    return replace(reply, groups=reply.groups * 2, part_offsets=reply.part_offsets * 2)


def with_parts(*offsets: int) -> Twist:
    def twist(reply: m.Reply) -> m.Reply:
        return (
            replace(reply, part_offsets=(offsets,)) if isinstance(reply, m.Found) and reply.chunks else reply
        )

    return twist


def reserved_far_away(reply: m.Reply) -> m.Reply:
    if not isinstance(reply, m.Reserved):
        return reply
    slots = [slot._replace(offset=slot.offset + FAR) for slot in split_slot_refs(reply.slots)]
    return replace(reply, slots=packed(slots))


class GivesAwayWhatIsTaken:
    """Reserves the slots in which it has found something before."""

    def __init__(self) -> None:
        self.taken: list[SlotRef] = []

    def __call__(self, reply: m.Reply) -> m.Reply:
        if isinstance(reply, m.Found):
            self.taken += [slot for part in reply.groups for slot in split_slot_refs(part.slots)]
        if isinstance(reply, m.Reserved) and self.taken:
            slots = split_slot_refs(reply.slots)
            return replace(
                reply, slots=packed([self.taken[at % len(self.taken)] for at in range(len(slots))])
            )
        return reply


def forgets(reply: m.Reply) -> m.Reply:
    if isinstance(reply, m.Found):
        return m.Refused(id=reply.id, boot=reply.boot, code=Code.UNKNOWN_SESSION, detail="who are you?")
    return reply


BEFORE_A_SERVER: dict[str, Twist] = {
    "slots outside the arena": lambda reply: twisted(
        reply, lambda slots: [slot._replace(offset=slot.offset + FAR) for slot in slots]
    ),
    "slots of another generation": lambda reply: twisted(
        reply, lambda slots: [slot._replace(generation=slot.generation + 1) for slot in slots]
    ),
    "slots of other chunks": lambda reply: twisted(reply, lambda slots: [*slots[1:], *slots[:1]]),
    "more than was asked for": more_than_was_asked_for,
    "found without slots": without_slots,
    "found for another model": of_another_model,
    "parts elsewhere": with_parts(4096),
    "no parts": with_parts(),
    "reserved outside the arena": reserved_far_away,
    "reserved what is taken": GivesAwayWhatIsTaken(),
    WITHOUT_LOOKUPS: lambda reply: None if isinstance(reply, m.Found) else reply,
    WITHOUT_MEMORY: forgets,
}


class Middleman:
    """One connection to the honest server for each of its clients."""

    def __init__(self, context: zmq.Context, front: zmq.Socket, real: Path, twist: Twist) -> None:
        self._context = context
        self._front = front
        self._real = f"ipc://{real / SOCKET}"
        self._twist = twist
        self._behind: dict[bytes, zmq.Socket] = {}
        self._poller = zmq.Poller()
        self._poller.register(front, zmq.POLLIN)

    def step(self) -> None:
        ready = dict(self._poller.poll())
        if self._front in ready:
            client, *frames = self._front.recv_multipart()
            self._server_of(client).send_multipart(frames)
        for client, behind in self._behind.items():
            if behind in ready:
                reply = self._twist(decode_reply(behind.recv()))
                if reply is not None:
                    self._front.send_multipart([client, encode(reply)])

    def _server_of(self, client: bytes) -> zmq.Socket:
        if client not in self._behind:
            socket = self._behind[client] = self._context.socket(zmq.DEALER)
            socket.connect(self._real)
            self._poller.register(socket, zmq.POLLIN)
        return self._behind[client]


def main() -> None:
    runtime_dir, lie = Path(sys.argv[1]), sys.argv[2]
    with zmq.Context() as context, context.socket(zmq.ROUTER) as front:
        front.bind(f"ipc://{runtime_dir / SOCKET}")
        if lie in BEFORE_A_SERVER:
            middleman = Middleman(context, front, Path(sys.argv[3]), BEFORE_A_SERVER[lie])
            while True:
                middleman.step()
        while True:
            client, *frames = front.recv_multipart()
            for frame in ALONE[lie](decode_request(frames[0])):
                front.send_multipart([client, frame])


if __name__ == "__main__":
    main()
