"""The heartbeat's times, and what follows from them.  Pure."""

from dataclasses import dataclass

JITTER_PERCENT = 10  # of the interval, either way: many workers do not beat as one


@dataclass(frozen=True, slots=True)
class Timing:
    interval_ms: int = 1_000
    timeout_ms: int = 500  # after which a ping counts as unanswered
    fail_after: int = 3  # unanswered pings in a row
    recover_timeout_ms: int = 5_000  # for a registration, the mapping of the arena included
    hold_ms_max: int = 30_000  # the longest that lost trust keeps the gate shut

    def __post_init__(self) -> None:
        assert self.interval_ms >= 4
        assert 0 < self.timeout_ms <= self.interval_ms
        assert self.fail_after >= 2, "one lost ping never degrades"

    @property
    def _gap_ms_max(self) -> int:
        return self.interval_ms * (100 + JITTER_PERCENT) // 100

    @property
    def hang_found_within_ms(self) -> int:
        """From the last pong of a server that hangs to DEGRADED: 1.1 x interval + fail_after x timeout.  The
        gate is shut `fail_after - 1` timeouts earlier."""
        return self._gap_ms_max + self.fail_after * self.timeout_ms

    @property
    def silence_ms_max(self) -> int:
        """Between two pings that the server hears, when two in between are lost."""
        return 3 * self._gap_ms_max

    @property
    def trusted_for_ms(self) -> int:
        """The gate is shut this long after the server was last good, our own process's stalls not counted.
        A registration's answer may be as old as it may take."""
        return max(self._gap_ms_max, self.recover_timeout_ms) + self.timeout_ms
