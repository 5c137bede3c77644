"""What one engine and all of them may hold reserved."""

import pytest

from cache_server.arena import Arena
from cache_server.limits import Limits, RefusedError
from cache_server.protocol.messages import Code
from cache_server.protocol.slots import Geometry
from kit import KIB, SLAB_BYTES, new_file

GEOMETRY = Geometry(8 * SLAB_BYTES, SLAB_BYTES)
A, B, C = b"engine A's owner", b"engine B's owner", b"engine C's owner"
LIMITS = Limits(stock_bytes_max=16 * KIB, reserved_bytes_max=24 * KIB)


@pytest.fixture
def arena() -> Arena:
    return Arena(new_file(GEOMETRY), GEOMETRY, 1)


def refusal(arena: Arena, owner: bytes, slot_bytes: int, count: int, chunk_bytes: int = 0) -> str:
    try:
        LIMITS.check_stock(arena, owner, slot_bytes, count, chunk_bytes or slot_bytes)
    except RefusedError as error:
        return error.code
    return ""


def test_a_slot_fits_into_a_slab(arena: Arena) -> None:
    assert refusal(arena, A, SLAB_BYTES, 1) == ""
    assert refusal(arena, A, SLAB_BYTES + 4096, 1) == Code.TOO_LARGE


def test_one_engine_has_its_bound(arena: Arena) -> None:
    assert refusal(arena, A, 4 * KIB, 4) == ""
    assert refusal(arena, A, 4 * KIB, 5) == Code.TOO_LARGE  # also tomorrow
    arena.reserve(4 * KIB, 3, A)
    assert refusal(arena, A, 4 * KIB, 1) == ""
    assert refusal(arena, A, 8 * KIB, 1) == Code.BUSY
    assert refusal(arena, B, 8 * KIB, 1) == ""


def test_no_group_takes_what_an_engines_other_groups_need(arena: Arena) -> None:
    assert refusal(arena, A, 4 * KIB, 2, chunk_bytes=8 * KIB) == ""
    assert refusal(arena, A, 4 * KIB, 3, chunk_bytes=8 * KIB) == Code.TOO_LARGE


def test_all_together_have_theirs(arena: Arena) -> None:
    (slot, *_) = arena.reserve(4 * KIB, 4, A)
    arena.reserve(4 * KIB, 2, B)
    assert refusal(arena, C, 4 * KIB, 1) == Code.BUSY
    arena.abort(A, slot.number)
    assert refusal(arena, C, 4 * KIB, 1) == ""


def test_a_refusal_says_how_much_there_was_and_may_be(arena: Arena) -> None:
    arena.reserve(4 * KIB, 3, A)
    with pytest.raises(RefusedError, match="12288 bytes are in your stock; with 8192 more it passes 16384"):
        LIMITS.check_stock(arena, A, 8 * KIB, 1, 8 * KIB)
    with pytest.raises(RefusedError, match="this arena takes 16384 at most"):
        LIMITS.check_stock(arena, A, 20 * KIB, 1, 20 * KIB)
