"""Who holds readiness back, why, and until when at most.  Pure."""

from collections.abc import Iterable

import msgspec

HOLDS_MAX = 64
TTL_MS_MAX = 86_400_000


class Hold(msgspec.Struct, frozen=True):
    owner: str
    reason: str
    until_ms: int  # by the machine's monotonic clock


def running(holds: Iterable[Hold], now_ms: int) -> tuple[Hold, ...]:
    """Those that have not ended; one that would last too long is of another boot of the machine."""
    return tuple(hold for hold in holds if now_ms < hold.until_ms <= now_ms + TTL_MS_MAX)


def with_hold(holds: Iterable[Hold], new: Hold) -> tuple[Hold, ...]:
    """An owner has one hold: a new one takes the old one's place."""
    return (*without_owner(holds, new.owner), new)


def without_owner(holds: Iterable[Hold], owner: str) -> tuple[Hold, ...]:
    return tuple(hold for hold in holds if hold.owner != owner)
