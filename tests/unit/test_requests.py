"""What a reply to a lookup must be like before anything is built on it."""

import pytest

from cache_server.protocol import messages as m
from cache_server.protocol.keys import SLOT_REF
from lmconnector.geometry import GroupLayout
from lmconnector.requests import LEASE_MS_MIN, fits

FULL = GroupLayout(block_tokens=16, blocks_per_chunk=8, window=0)
WINDOW = GroupLayout(block_tokens=16, blocks_per_chunk=8, window=2)


def found(chunks: int, *firsts: int, lease_ms: int = LEASE_MS_MIN) -> m.Found:
    groups = tuple(m.Part(first, bytes(SLOT_REF.size * (chunks - first))) for first in firsts)
    offsets = ((0,),) * len(firsts)
    return m.Found(id=1, boot=1, chunks=chunks, groups=groups, part_offsets=offsets, lease_ms=lease_ms)


@pytest.mark.parametrize(
    ("reply", "groups"),
    [
        (found(0), (FULL,)),
        (found(3, 0), (FULL,)),
        (found(4, 0), (FULL,)),
        (found(4, 0, 2), (FULL, WINDOW)),
        (found(4, 0, 1), (FULL, WINDOW)),
        (found(1, 0, 0), (FULL, WINDOW)),
    ],
)
def test_it_fits(reply: m.Found, groups: tuple[GroupLayout, ...]) -> None:
    assert fits(reply, 4, groups)


@pytest.mark.parametrize(
    ("reply", "groups"),
    [
        (found(5, 0), (FULL,)),  # more than was asked for
        (found(4, 4), (FULL,)),  # no slots
        (found(4, 1), (FULL,)),  # not from the beginning
        (found(4, 0, 3), (FULL, WINDOW)),  # less than the window
        (found(4, 0, 0), (FULL,)),  # of another model
        (found(4, 0), (FULL, WINDOW)),
        (found(4, 0, lease_ms=LEASE_MS_MIN - 1), (FULL,)),  # over before it is of use
    ],
)
def test_it_does_not_fit(reply: m.Found, groups: tuple[GroupLayout, ...]) -> None:
    assert not fits(reply, 4, groups)
