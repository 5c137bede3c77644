"""Bytes <-> messages.  Any bytes in: a message or a `ProtocolError`, in bounded time and memory."""

from collections.abc import Sequence
from typing import TypeVar

import msgpack
import msgspec

from cache_server.protocol.messages import (
    DEPTH_MAX,
    ID_MAX,
    ITEMS_MAX,
    MESSAGE_BYTES_MAX,
    REPLY_BYTES_MAX,
    REPLY_ITEMS_MAX,
    Code,
    Reply,
    Request,
)

M = TypeVar("M", Request, Reply)

DETAIL_MAX = 512  # a detail may quote what it refuses, which is as long as its sender likes


class ProtocolError(Exception):
    """The bytes are no message.  `id` is the request's own where it could still be read, else 0."""

    def __init__(self, code: str, detail: str, id: int = 0) -> None:  # noqa: A002
        detail = detail[:DETAIL_MAX]
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.id = id


def _by_op(base: type[M]) -> dict[object, type[M]]:
    return {cls.__struct_config__.tag: cls for cls in base.__subclasses__()}


REQUESTS = _by_op(Request)
REPLIES = _by_op(Reply)


_encoder = msgspec.msgpack.Encoder()


def encode(message: Request | Reply) -> bytes:
    return _encoder.encode(message)


def decode_request(data: bytes) -> Request:
    return _decode(data, REQUESTS, MESSAGE_BYTES_MAX, ITEMS_MAX)


def decode_reply(data: bytes) -> Reply:
    return _decode(data, REPLIES, REPLY_BYTES_MAX, REPLY_ITEMS_MAX)


def _decode(data: bytes, by_op: dict[object, type[M]], bytes_max: int, items_max: int) -> M:
    if len(data) > bytes_max:
        raise ProtocolError(Code.TOO_LARGE, f"{len(data)} bytes, at most {bytes_max} are read")
    check_shape(data, items_max)
    try:
        body: object = msgpack.unpackb(data, object_pairs_hook=_map)
    except ValueError as error:  # what `check_shape` leaves: text that is no UTF-8, a key that is no text
        raise ProtocolError(Code.MALFORMED, f"{type(error).__name__}: {error}") from error
    if not isinstance(body, dict):
        raise ProtocolError(Code.MALFORMED, f"expected a map, got {type(body).__name__}")
    id = body.get("id")  # noqa: A001
    if type(id) is not int or not 0 <= id <= ID_MAX:
        raise ProtocolError(Code.MALFORMED, "`id` is missing or not an integer in [0, 2**63)")
    op = body.get("op")
    cls = by_op.get(op) if isinstance(op, str) else None
    if cls is None:
        raise ProtocolError(Code.UNKNOWN_OP, f"op {str(op)[:40]!r}; known: {', '.join(map(str, by_op))}", id)
    try:
        return msgspec.convert(body, cls, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise ProtocolError(Code.MALFORMED, f"{op}: {error}", id) from error


def _map(pairs: Sequence[tuple[object, object]]) -> dict[object, object]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise ValueError("a map has a key twice")
    return body


# For each first byte from 0xc0 to 0xdf: (bytes of the length field, bytes that follow it, values per unit of
# length); a value without a length field has its bytes in the second place.
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2,
          0xD2: 4, 0xD3: 8}  # fmt: skip
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def check_shape(data: bytes, items_max: int = ITEMS_MAX) -> None:
    """Refuses what would be deep, long or truncated once decoded, from its headers alone."""
    left = 1  # values still to come in the innermost container
    outer: list[int] = []  # and in those around it
    announced = 1  # values in all
    at = 0
    end = len(data)
    while left or outer:
        if not left:
            left = outer.pop()
            continue
        left -= 1
        if at >= end:
            raise ProtocolError(Code.MALFORMED, f"truncated: {end} bytes and more announced")
        first = data[at]
        if first < 0x80 or first >= 0xE0:  # most values are small numbers and short names
            at += 1
        elif 0xA0 <= first < 0xC0:
            at += 1 + (first & 0x1F)
        else:
            at, children = _skip(data, at)
            if children:
                outer.append(left)
                left = children
                if len(outer) > DEPTH_MAX:
                    raise ProtocolError(Code.TOO_LARGE, f"nested deeper than {DEPTH_MAX}")
                announced += children
                if announced > items_max:
                    raise ProtocolError(Code.TOO_LARGE, f"more than {items_max} values")
    if at != end:
        raise ProtocolError(Code.MALFORMED, f"the message ends at byte {at} of {end}")


def _skip(data: bytes, at: int) -> tuple[int, int]:
    """-> where the next value begins, and how many the one at `at` contains; small ones are not for here"""
    first = data[at]
    at += 1
    if first < 0xA0:
        return at, (first & 0x0F) * (2 if first < 0x90 else 1)
    if (size := _BYTES.get(first)) is not None:
        return at + size + int.from_bytes(data[at : at + size]), 0
    if (size := _FIXED.get(first)) is not None:
        return at + size, 0
    if (container := _CONTAINERS.get(first)) is not None:
        size, values = container
        return at + size, values * int.from_bytes(data[at : at + size])
    raise ProtocolError(Code.MALFORMED, f"byte 0x{first:02x} at {at - 1}: extension types are not used")
