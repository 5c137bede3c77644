"""When the canary runs, and what its runs have shown.  Pure.

Rule 1: one run at a time; who asks while one runs gets that one's outcome.
Rule 2: a run that exceeds its deadline has failed at that moment, whether or not its thread comes back; what
it says later belongs to an older generation, is dropped and counted.
Rule 3: `fail_after` failures in a row are a verdict, one success ends it.  Finding no room ends it only if
the failure lay before the stage at which room is asked for.
"""

from collections import Counter
from collections.abc import Mapping
from enum import Enum

import msgspec

STAGES = ("connect", "register", "reserve", "write", "commit", "lookup", "read", "compare", "drop")
STAGES_BEFORE_ROOM = STAGES[:3]


class Result(Enum):
    OK = "ok"
    NO_ROOM = "no_room"  # nothing was free, and a canary evicts nothing: the rest of the path answered
    EXCUSED = "excused"  # no answer, while the loop was busy with long, legal work
    FAILED = "failed"


class Outcome(msgspec.Struct, frozen=True):
    result: Result
    stage: str = ""  # where it failed, or found no room
    reason: str = ""
    took_ms: int = 0
    unanswered: bool = False  # the failure is that nothing came


class TrialRules(msgspec.Struct, frozen=True):
    idle_ms: int  # real traffic within it makes a run superfluous; 0: none is ever run unasked
    deadline_ms: int  # of a whole run
    fail_after: int
    retry_ms: int = 1_000  # to the next run after a failure
    slack_ms: int = 500  # for the thread to tell the outcome

    @property
    def failure_found_within_ms(self) -> int:
        """From the moment the path breaks while nobody uses it, to the verdict."""
        return self.idle_ms + self.fail_after * (self.deadline_ms + self.slack_ms + self.retry_ms)


class Record(msgspec.Struct, frozen=True):
    """What is known; immutable."""

    generation: int = 0  # of the last run that ended
    running: bool = False
    last: Outcome | None = None
    last_ms: int = 0
    failures: int = 0  # in a row
    failed: bool = False  # the verdict
    good_ms: int | None = None  # the last success
    proven: bool = False  # the last run that could tell anything was good
    counts: Mapping[str, int] = msgspec.field(default_factory=dict)  # by result
    late: int = 0  # outcomes that came after their run was given up


class Trials:
    """Its caller is one thread."""

    def __init__(self, rules: TrialRules, now_ms: int) -> None:
        self.rules = rules
        self._generation = 0
        self._ended = 0  # the last generation with an outcome
        self._began_ms = 0
        self._due_ms = now_ms if rules.idle_ms else None
        self._last: Outcome | None = None
        self._last_ms = 0
        self._failures = 0
        self._failed_stage = ""
        self._good_ms: int | None = None
        self._counts: Counter[str] = Counter({result.value: 0 for result in Result})
        self._late = 0
        self._occupied = False  # a thread that was given up has not come back

    @property
    def begun(self) -> int:
        """The generation of the last run that began."""
        return self._generation

    @property
    def running(self) -> bool:
        return self._generation != self._ended

    @property
    def may_begin(self) -> bool:
        return not self.running and not self._occupied

    def is_due(self, now_ms: int, proven_ms: int | None) -> bool:
        """`proven_ms`: when real traffic last went the whole way."""
        if not self.may_begin or self._due_ms is None or now_ms < self._due_ms:
            return False
        if proven_ms is not None and not self._failures and now_ms - proven_ms < self.rules.idle_ms:
            self._due_ms = proven_ms + self.rules.idle_ms
            return False
        return True

    def begin(self, now_ms: int) -> int:
        """-> the run's generation"""
        assert self.may_begin, "one at a time"
        self._generation += 1
        self._began_ms = now_ms
        return self._generation

    def end(self, generation: int, outcome: Outcome, now_ms: int, leased_ms: int = -1) -> bool:
        """`leased_ms`: when the loop was last seen at long, legal work; -> whether the outcome counts"""
        if generation == self._generation:
            self._occupied = False
        if generation <= self._ended:
            self._late += 1
            return False
        assert generation == self._generation, "of no run that began"
        self._conclude(outcome, now_ms, leased_ms)
        return True

    def give_up(self, stage: str, now_ms: int, leased_ms: int = -1) -> bool:
        """-> whether the run has exceeded its deadline, and has now failed"""
        rules = self.rules
        if not self.running or now_ms - self._began_ms <= rules.deadline_ms + rules.slack_ms:
            return False
        took_ms = now_ms - self._began_ms
        reason = f"no outcome within {rules.deadline_ms} ms"
        self._occupied = True
        self._conclude(Outcome(Result.FAILED, stage, reason, took_ms, unanswered=True), now_ms, leased_ms)
        return True

    def record(self) -> Record:
        return Record(
            generation=self._ended,
            running=self.running,
            last=self._last,
            last_ms=self._last_ms,
            failures=self._failures,
            failed=self._failures >= self.rules.fail_after,
            good_ms=self._good_ms,
            proven=self._last is not None and not self._failures,
            counts=dict(self._counts),
            late=self._late,
        )

    def _conclude(self, outcome: Outcome, now_ms: int, leased_ms: int) -> None:
        if outcome.unanswered and leased_ms >= self._began_ms:
            outcome = msgspec.structs.replace(outcome, result=Result.EXCUSED)
        self._ended = self._generation
        self._last, self._last_ms = outcome, now_ms
        self._counts[outcome.result.value] += 1
        match outcome.result:
            case Result.OK:
                self._failures = 0
                self._good_ms = now_ms
            case Result.NO_ROOM:
                self._failures = 0 if self._failed_stage in STAGES_BEFORE_ROOM else self._failures
            case Result.EXCUSED:
                pass
            case Result.FAILED:
                self._failures += 1
                self._failed_stage = outcome.stage
        if self.rules.idle_ms:
            soon = outcome.result in (Result.FAILED, Result.EXCUSED)
            self._due_ms = now_ms + (self.rules.retry_ms if soon else self.rules.idle_ms)
