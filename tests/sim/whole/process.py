"""A process of an engine: it may stand still at any moment, be cut off from the server, and it dies once."""

from collections.abc import Callable
from contextlib import suppress
from random import Random

from sim.whole.timeline import Timeline

STALL_MS_MAX = 1_000  # at a look at the clock


class ProcessDiedError(BaseException):
    """Nothing of what it was at is ever done; no `except Exception` of it keeps it alive."""


class Process:
    def __init__(self, time: Timeline, rng: Random) -> None:
        self.is_dead = False
        self.stall_chance = 0.0  # at each look at the clock
        self.there_cut_ms = self.back_cut_ms = 0  # until then nothing it says gets there, it hears nothing
        self.hurt_ms = -1  # when the last message from it or to it did not get through as it was
        self._time = time
        self._rng = rng
        self._stalled_until_ms = 0
        self._stalls = 0  # at looks at the clock that it is in the midst of
        self._stalled_ms = 0  # those that are over
        self._stalled_since_ms = 0
        self._postponed: list[Callable[[], None]] = []

    def clock(self) -> int:
        if self.stall_chance and self._rng.random() < self.stall_chance:
            self._stall_here(self._rng.randint(1, STALL_MS_MAX))
        return self._time.now_ms

    @property
    def is_stalled(self) -> bool:
        return self._stalls > 0 or self._time.now_ms < self._stalled_until_ms

    @property
    def awake_ms(self) -> int:
        """Time as the process knows it: stalls do not count."""
        now_ms = self._time.now_ms
        return now_ms - self._stalled_ms - (now_ms - self._stalled_since_ms if self._is_counting else 0)

    @property
    def stalled_ms(self) -> int:
        """In all."""
        return self._time.now_ms - self.awake_ms

    def run(self, work: Callable[[], None]) -> None:
        """Now, or when it goes on."""
        if self.is_dead:
            return
        if self.is_stalled:
            self._postponed.append(work)
            return
        with suppress(ProcessDiedError):
            work()

    def end_if_dead(self) -> None:
        if self.is_dead:
            raise ProcessDiedError

    def stall(self, ms: int) -> None:
        """From outside, and between two things that it does."""
        self._count()
        self._stalled_until_ms = max(self._stalled_until_ms, self._time.now_ms + ms)
        self._time.at(self._stalled_until_ms, self._go_on)

    def end_stall(self) -> None:
        self._stalled_until_ms = self._time.now_ms
        self._go_on()

    def _stall_here(self, ms: int) -> None:
        """The world goes on meanwhile."""
        self._count()
        self._stalls += 1
        self._time.stall(ms)
        self._stalls -= 1
        self._go_on()
        self.end_if_dead()

    _is_counting = False

    def _count(self) -> None:
        if not self._is_counting:
            self._is_counting, self._stalled_since_ms = True, self._time.now_ms

    def _go_on(self) -> None:
        if self.is_stalled:
            return
        if self._is_counting:
            self._is_counting = False
            self._stalled_ms += self._time.now_ms - self._stalled_since_ms
        postponed, self._postponed = self._postponed, []
        for work in postponed:
            self._time.after(0, lambda work=work: self.run(work))
