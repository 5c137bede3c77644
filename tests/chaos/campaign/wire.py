"""What a relay does to the bytes that pass it: messages are told apart, and treated by rules.  Pure."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from random import Random

from msgspec import Struct

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4  # of a frame's first byte
NO_FLAGS = b"\xff"  # bits that are to be zero
NO_MESSAGE = b"\xc1"  # the one byte that begins no value of MessagePack: nothing else is as surely garbage
TRICKLE_MS = 5


class Rules(Struct, frozen=True, kw_only=True):
    """For one direction; shares are of the messages.  Whoever greets or beats is only delayed."""

    delay_ms: tuple[int, int] = (0, 0)  # in order: nobody overtakes
    loss: float = 0.0
    duplicate: float = 0.0
    garble: float = 0.0  # the receiver can't decode it
    tear: float = 0.0  # its frame can't be read: the receiver drops the connection
    bytes_per_ms: int = 0  # a trickle; 0: as fast as it goes
    stopped: bool = False  # nothing is read, and the connection stays open


CLEAN = Rules()


class Order(Struct, frozen=True, kw_only=True):
    to_server: Rules = CLEAN
    to_client: Rules = CLEAN
    closed: bool = False  # those that are open are closed, and new ones at once
    close_once: bool = False  # what is parked is lost with its connection


class Kind(Enum):
    GREETING = "greeting"
    COMMAND = "command"
    MESSAGE = "message"


@dataclass(frozen=True, slots=True)
class Piece:
    kind: Kind
    data: bytes


@dataclass(slots=True)
class Zmtp:
    """Cuts a stream into greeting, commands and whole messages.

    The greeting comes in whatever parts it was read: each side sends the rest of its own only after the
    beginning of the other's.
    """

    _greeting_left: int = GREETING_BYTES
    _held: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> Iterator[Piece]:
        self._held += data
        if self._greeting_left and (greeted := self._take(min(self._greeting_left, len(self._held)))):
            self._greeting_left -= len(greeted)
            yield Piece(Kind.GREETING, greeted)
        while not self._greeting_left and (ends := self._frames()) is not None:
            end, is_command = ends
            yield Piece(Kind.COMMAND if is_command else Kind.MESSAGE, self._take(end))

    def _frames(self) -> tuple[int, bool] | None:
        """Where the first message or command ends, if all of it is here."""
        end, held = 0, self._held
        while end + 2 <= len(held):
            flags = held[end]
            head = 9 if flags & LONG else 2
            end += head + int.from_bytes(held[end + 1 : end + head], "big")
            if end > len(held):
                return None
            if not flags & MORE:
                return end, bool(flags & COMMAND)
        return None

    def _take(self, count: int) -> bytes:
        taken = bytes(self._held[:count])
        del self._held[:count]
        return taken


@dataclass(slots=True)
class Flow:
    """One direction of one connection: bytes in, the same or others out, now or later."""

    random: Random
    _zmtp: Zmtp = field(default_factory=Zmtp)
    _waiting: deque[tuple[int, bytes]] = field(default_factory=deque)
    _last_ms: int = 0  # when the last of them is due

    def feed(self, data: bytes, rules: Rules, now_ms: int) -> None:
        for piece in self._zmtp.feed(data):
            for treated in treat(piece, rules, self.random):
                self._wait(treated, rules, now_ms)

    def take(self, now_ms: int) -> bytes:
        """What is due."""
        due: list[bytes] = []
        while self._waiting and self._waiting[0][0] <= now_ms:
            due.append(self._waiting.popleft()[1])
        return b"".join(due)

    @property
    def due_ms(self) -> int | None:
        return self._waiting[0][0] if self._waiting else None

    def _wait(self, data: bytes, rules: Rules, now_ms: int) -> None:
        self._last_ms = max(self._last_ms, now_ms + self.random.randint(*rules.delay_ms))
        if not rules.bytes_per_ms:
            self._waiting.append((self._last_ms, data))
            return
        drop = rules.bytes_per_ms * TRICKLE_MS
        for at in range(0, len(data), drop):
            self._waiting.append((self._last_ms, data[at : at + drop]))
            self._last_ms += TRICKLE_MS


def treat(piece: Piece, rules: Rules, random: Random) -> list[bytes]:
    data = piece.data
    if piece.kind is not Kind.MESSAGE:
        return [data]
    if random.random() < rules.loss:
        return []
    if random.random() < rules.tear:
        return [NO_FLAGS + data[1:]]
    if random.random() < rules.garble:
        at = 9 if data[0] & LONG else 2
        return [data[:at] + NO_MESSAGE + data[at + 1 :]]
    return [data, data] if random.random() < rules.duplicate else [data]
