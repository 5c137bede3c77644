"""Does every part of the server move?  What its thread says of itself, and the rule that judges it.  Pure.

Rule 1: outstanding work that does not move is a stall; idle is none, however long.  A part
that must turn at least every `period_ms` has its next turn outstanding from then on.
Rule 2: a beat has one writer and is an immutable value, replaced by one assignment: any thread reads it
without a lock, also while the writer is stuck.
Rule 3: who comes after a part's earlier thread gets a new epoch; what the old one still says is not heard.
Rule 4: while the reader itself stood still, nobody is blamed: time is counted from `awake_ms` on.
"""

import contextlib
from collections.abc import Callable, Iterator
from enum import Enum
from typing import NamedTuple

import msgspec

LEASE_MS_MAX = 600_000  # a longer one is a stall with a name


class Motion(Enum):
    ABSENT = "absent"  # not begun
    IDLE = "idle"
    MOVING = "moving"
    LEASED = "leased"  # long, legal, and said beforehand
    LATE = "late"
    STALLED = "stalled"
    LIVELOCKED = "livelocked"  # it moves, and its oldest work gets no nearer to its end
    DEAD = "dead"
    ENDED = "ended"  # in good order


class Bounds(msgspec.Struct, frozen=True):
    """Of one part, counted from when its outstanding work last moved; 0: no such bound."""

    late_ms: int
    stall_ms: int
    period_ms: int = 0
    age_ms: int = 0  # of its oldest work

    def __post_init__(self) -> None:
        assert 0 < self.late_ms <= self.stall_ms


class Beat(NamedTuple):
    epoch: int
    ticks: int
    finished: int
    at_ms: int
    since_ms: int | None  # its oldest outstanding work


class Lease(NamedTuple):
    name: str
    until_ms: int


class Judgement(NamedTuple):
    """What the rule makes of a part at one moment."""

    motion: Motion
    unmoved_ms: int = 0
    outstanding_ms: int = 0  # age of the oldest work
    lease: str = ""


class Part:
    """Read by anybody; written through the `Pulse` of its latest epoch alone."""

    def __init__(self, name: str, bounds: Bounds, *, critical: bool) -> None:
        self.name = name
        self.bounds = bounds
        self.critical = critical  # without it the process is not alive
        self.beat: Beat | None = None
        self.leases: tuple[Lease, ...] = ()
        self._epoch = 0
        self._lives: Callable[[], bool] = lambda: True
        self._ended = False

    @property
    def epoch(self) -> int:
        return self._epoch

    def begin(self, now_ms: int, lives: Callable[[], bool]) -> "Pulse":
        """A new thread takes the part over; `lives` tells whether it still runs."""
        self._epoch += 1
        self._lives = lives
        self._ended = False
        self.leases = ()
        self.beat = Beat(self._epoch, 0, 0, now_ms, None)
        return Pulse(self, self._epoch)

    def end(self) -> None:
        self._ended = True

    def judge(self, now_ms: int, awake_ms: int) -> Judgement:
        beat, leases, bounds = self.beat, self.leases, self.bounds
        if beat is None:
            return Judgement(Motion.ABSENT)
        if self._ended:
            return Judgement(Motion.ENDED)
        if not self._lives():
            return Judgement(Motion.DEAD)
        begun_ms = self._outstanding_since(beat, now_ms)
        if begun_ms is None:
            return Judgement(Motion.IDLE)
        over = [lease.until_ms for lease in leases if lease.until_ms <= now_ms]
        unmoved_ms = max(0, now_ms - max(beat.at_ms, begun_ms, awake_ms, *over))
        outstanding_ms = now_ms - begun_ms
        running = [lease.name for lease in leases if lease.until_ms > now_ms]
        if running:
            return Judgement(Motion.LEASED, unmoved_ms, outstanding_ms, running[-1])
        if unmoved_ms > bounds.stall_ms:
            motion = Motion.STALLED
        elif unmoved_ms > bounds.late_ms:
            motion = Motion.LATE
        elif bounds.age_ms and beat.since_ms is not None and now_ms - max(begun_ms, awake_ms) > bounds.age_ms:
            motion = Motion.LIVELOCKED
        else:
            motion = Motion.IDLE if beat.since_ms is None else Motion.MOVING
        return Judgement(motion, unmoved_ms, outstanding_ms)

    def _outstanding_since(self, beat: Beat, now_ms: int) -> int | None:
        due_ms = beat.at_ms + self.bounds.period_ms
        turn = [due_ms] if self.bounds.period_ms and now_ms > due_ms else []
        work = [] if beat.since_ms is None else [beat.since_ms]
        return min([*turn, *work], default=None)


class Pulse:
    """How a part's thread tells that it moves: one attribute is written for each tick."""

    def __init__(self, part: Part, epoch: int) -> None:
        self._part = part
        self._epoch = epoch
        self.ticks = 0
        self._finished = 0

    def tick(self, now_ms: int, since_ms: int | None = None, finished: int = 0) -> None:
        """`since_ms`: the begin of the oldest work that is still outstanding; `finished`: how much more is
        done now than at the last tick."""
        self.ticks += 1
        self._finished += finished
        if self._part.epoch == self._epoch:
            self._part.beat = Beat(self._epoch, self.ticks, self._finished, now_ms, since_ms)

    @contextlib.contextmanager
    def busy(self, name: str, lease_ms: int, clock: Callable[[], int]) -> Iterator[None]:
        """Work that is legal and takes long: no stall before `lease_ms` have passed."""
        assert 0 < lease_ms <= LEASE_MS_MAX, f"a lease of {lease_ms} ms for {name!r}"
        lease = Lease(name, clock() + lease_ms)
        if self._part.epoch == self._epoch:
            self._part.leases = (*self._part.leases, lease)
        try:
            yield
        finally:
            if self._part.epoch == self._epoch:
                held = list(self._part.leases)
                held.remove(lease)
                self._part.leases = tuple(held)
                beat = self._part.beat
                assert beat is not None
                self.tick(clock(), beat.since_ms)

    def end(self) -> None:
        if self._part.epoch == self._epoch:
            self._part.end()


class Awake:
    """Since when a reader has turned without a gap: a process that was stopped and goes on blames nobody for
    the time it slept itself."""

    def __init__(self, gap_ms: int) -> None:
        self._gap_ms = gap_ms
        self._last_ms: int | None = None
        self.since_ms = 0

    def note(self, now_ms: int) -> int:
        """Called at every turn; -> since when it is awake."""
        if self._last_ms is None or now_ms - self._last_ms > self._gap_ms:
            self.since_ms = now_ms
        self._last_ms = now_ms
        return self.since_ms
