"""JSON out of files that others may have written, cut off or spoiled."""

from contextlib import suppress
from typing import TypeVar

import msgspec

T = TypeVar("T")


def decoded(text: bytes, expected: type[T]) -> T | None:
    """None where it is nothing of that kind."""
    # Two of what the decoder raises are no errors of its own: bytes that are no UTF-8, and lists too deep.
    with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return msgspec.json.decode(text, type=expected)
    return None
