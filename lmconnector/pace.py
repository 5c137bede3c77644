"""How long things take, from those before: loads, to foretell the next one, and pings.  Pure."""

from dataclasses import dataclass

WEIGHT = 0.2  # of the newest measurement
FIRST_GUESS_BYTES_PER_S = 4e9  # until a load was measured


class Pace:
    def __init__(self, block_bytes: int) -> None:
        self._us_per_block = 1e6 * block_bytes / FIRST_GUESS_BYTES_PER_S

    def note(self, blocks: int, us: int) -> None:
        if blocks:
            self._us_per_block += WEIGHT * (us / blocks - self._us_per_block)

    def ms_of(self, blocks: int) -> float:
        return self._us_per_block * blocks / 1_000


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Of the pings answered so far; 0: none was."""

    last_us: int = 0
    mean_us: int = 0  # of the latest ones
    max_us: int = 0  # since the process began

    def then(self, us: int) -> "RoundTrip":
        mean_us = round(self.mean_us + WEIGHT * (us - self.mean_us)) if self.mean_us else us
        return RoundTrip(us, mean_us, max(self.max_us, us))
