"""Nasty frames: made by hand, and bred from good ones."""

import struct
from collections.abc import Sequence
from random import Random

import msgpack

from cache_server.protocol.messages import DEPTH_MAX, ITEMS_MAX, MESSAGE_BYTES_MAX

HUGE = b"\xff\xff\xff\xff"
STRANGE_VALUES = (
    None, True, False, 0, 1, -1, 127, 128, -33, 2**31, 2**48 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63),
    0.0, 1.0, -0.5, 1e300, float("nan"), float("inf"), "", "x", "\0", "../..",
    "é" * 300, b"", b"\0", b"x" * 31,
    b"x" * 33, b"\xff" * 5000, [], [[]], [None], [0] * 100, {}, {"a": {}}, {"part_bytes": 1}, {"id": 1},
)  # fmt: skip


def hostile_frames() -> dict[str, bytes]:
    """What each is -> its bytes; none is a message."""
    return {
        "nothing": b"",
        "nil": b"\xc0",
        "a number": b"\x07",
        "the byte that is never used": b"\xc1",
        "a string of 4 GiB": b"\xdb" + HUGE,
        "bytes of 4 GiB": b"\xc6" + HUGE,
        "an array of 2**32 - 1": b"\xdd" + HUGE,
        "an array of 2**32 - 1, some of them there": b"\xdd" + HUGE + bytes(100_000),
        "a map of 2**32 - 1": b"\xdf" + HUGE,
        "a map of 2**32 - 1, some of them there": b"\xdf" + HUGE + b"\xa1a\x01" * 10_000,
        "a huge map within a map": b"\x81\xa2id\xdf" + HUGE,
        "a length cut short": b"\xdd\x00\x00",
        "just too many values": b"\xdd" + struct.pack(">I", ITEMS_MAX) + bytes(ITEMS_MAX),
        "too many values on two levels": msgpack.packb([[0] * (ITEMS_MAX // 2)] + [0] * (ITEMS_MAX // 2)),
        "too many empty maps": b"\xdd" + struct.pack(">I", ITEMS_MAX + 1) + b"\x80" * (ITEMS_MAX + 1),
        "deep arrays": b"\x91" * (DEPTH_MAX + 1) + b"\xc0",
        "deeper arrays": b"\x91" * 500_000 + b"\xc0",
        "deep maps": b"\x81\xa1a" * 300_000 + b"\xc0",
        "an open end": b"\x91" * DEPTH_MAX,
        "too many bytes": b"\xc6" + struct.pack(">I", MESSAGE_BYTES_MAX) + bytes(MESSAGE_BYTES_MAX),
        "an extension": b"\xd4\x01\x00",
        "a large extension": b"\xc9" + HUGE + b"\x01",
        "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
        "text that is no UTF-8": b"\x82\xa2id\x01\xa2op\xa2\xff\xfe",
        "a surrogate": b"\x82\xa2id\x01\xa2op\xa3\xed\xa0\x80",
        "a key that is a number": b"\x83\xa2id\x01\xa2op\xa4ping\x07\x07",
        "a key that is nil": b"\x83\xa2id\x01\xa2op\xa4ping\xc0\x07",
        "a key that is bytes": b"\x83\xa2id\x01\xa2op\xa4ping\xc4\x01a\x07",
        "a key that is an array": b"\x83\xa2id\x01\xa2op\xa4ping\x91\x01\x07",
        "a key that is a map": b"\x83\xa2id\x01\xa2op\xa4ping\x80\x07",
        "a key twice": b"\x83\xa2id\x01\xa2op\xa4ping\xa2id\x02",
        "a key twice, deep inside": b"\x83\xa2id\x01\xa2op\xa4ping\xa1x\x91\x82\xa1a\x01\xa1a\x01",
        "a message and one byte more": b"\x82\xa2id\x01\xa2op\xa4ping\x00",
        "two messages": b"\x82\xa2id\x01\xa2op\xa4ping" * 2,
        "an empty map": b"\x80",
        "a map without op": b"\x81\xa2id\x01",
        "an op that is nobody's": b"\x82\xa2id\x01\xa2op\xa5hello",
        "an op that is a number": b"\x82\xa2id\x01\xa2op\x07",
        "an op as long as can be": msgpack.packb({"id": 1, "op": "o" * (MESSAGE_BYTES_MAX - 100)}),
        "an op of bytes": msgpack.packb({"id": 1, "op": b"\xff" * (MESSAGE_BYTES_MAX - 100)}),
        "an id that is negative": msgpack.packb({"id": -1, "op": "ping"}),
        "an id that is true": msgpack.packb({"id": True, "op": "ping"}),
        "an id that is 2**63": msgpack.packb({"id": 2**63, "op": "ping"}),
        "an id that is a float": msgpack.packb({"id": 1.0, "op": "ping"}),
        "a choice as long as can be": msgpack.packb({"id": 1, "op": "ping", "phase": "x" * 1_000_000}),
        "JSON": b'{"id": 1, "op": "ping"}',
    }


def breed(random: Random, good: Sequence[bytes]) -> bytes:
    """A good frame, damaged in one to three ways."""
    frame = random.choice(good)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        frame = random.choice(MUTATIONS)(random, frame, good)
    return frame


def _flip_bit(random: Random, frame: bytes, _: Sequence[bytes]) -> bytes:
    return _with_byte(random, frame, lambda byte: byte ^ (1 << random.randrange(8)))


def _replace_byte(random: Random, frame: bytes, _: Sequence[bytes]) -> bytes:
    return _with_byte(
        random, frame, lambda _: random.choice((0, 0x80, 0x90, 0xC0, 0xC1, 0xFF, random.randrange(256)))
    )


def _truncate(random: Random, frame: bytes, _: Sequence[bytes]) -> bytes:
    return frame[: random.randrange(len(frame) + 1)]


def _extend(random: Random, frame: bytes, _: Sequence[bytes]) -> bytes:
    return frame + random.randbytes(random.randrange(1, 20))


def _splice(random: Random, frame: bytes, good: Sequence[bytes]) -> bytes:
    other = random.choice(good)
    return frame[: random.randrange(len(frame) + 1)] + other[random.randrange(len(other)) :]


def _insert(random: Random, frame: bytes, _: Sequence[bytes]) -> bytes:
    at = random.randrange(len(frame) + 1)
    return frame[:at] + random.randbytes(random.randrange(1, 9)) + frame[at:]


def _cut_out(random: Random, frame: bytes, _: Sequence[bytes]) -> bytes:
    at = random.randrange(len(frame) + 1)
    return frame[:at] + frame[at + random.randrange(1, 9) :]


def _announce_much(random: Random, frame: bytes, _: Sequence[bytes]) -> bytes:
    at = random.randrange(len(frame) + 1)
    return frame[:at] + random.choice((b"\xdb", b"\xc6", b"\xdd", b"\xdf")) + HUGE + frame[at:]


def _set_field(random: Random, frame: bytes, _: Sequence[bytes]) -> bytes:
    """Still a map, but with a value that is strange where it stands."""
    try:
        body = msgpack.unpackb(frame)
    except ValueError:
        return frame
    if not isinstance(body, dict) or not body:
        return frame
    inner = body.get("layout")
    if isinstance(inner, dict) and inner and random.randrange(2):
        inner[random.choice(list(inner))] = random.choice(STRANGE_VALUES)
    else:
        body[random.choice(list(body))] = random.choice(STRANGE_VALUES)
    return msgpack.packb(body)


def _drop_field(random: Random, frame: bytes, _: Sequence[bytes]) -> bytes:
    try:
        body = msgpack.unpackb(frame)
    except ValueError:
        return frame
    if isinstance(body, dict) and body:
        del body[random.choice(list(body))]
    return msgpack.packb(body)


MUTATIONS = (
    _flip_bit,
    _replace_byte,
    _truncate,
    _extend,
    _splice,
    _insert,
    _cut_out,
    _announce_much,
    _set_field,
    _drop_field,
)


def _with_byte(random: Random, frame: bytes, change) -> bytes:
    if not frame:
        return frame
    at = random.randrange(len(frame))
    return frame[:at] + bytes([change(frame[at])]) + frame[at + 1 :]
