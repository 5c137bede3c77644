"""The state of the server, and everything that is said about it.  Pure: no clock, thread, socket or log.

Rule 1: `Health.judge` is the only place that decides; one thread calls it.  What it publishes is an immutable
`Verdict`, so that any other thread reads it at any moment.
Rule 2: *live* depends on parts that stand still or are dead, and on nothing else: only a restart would help.
What a restart does not help (a failed canary, a missing engine, a full disk) takes away *ready*, or degrades.
Rule 3: a change of state is one `Transition`; while the state stays, its reason may change without noise.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, IntEnum

import msgspec

from cache_server.beats import Judgement, Motion, Part
from cache_server.endpoints import Endpoints
from cache_server.holds import Hold
from cache_server.trials import Record, TrialRules

TRANSITIONS_KEPT = 100
DUMP_GAP_MS = 60_000  # between two stack dumps


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    DEGRADED = "degraded"  # serves, without something that is optional
    FAILING = "failing"  # runs, and can't be relied on now
    PAUSED = "paused"  # an operator holds it back
    DRAINING = "draining"
    STOPPED = "stopped"


_AT_WORK = frozenset({State.READY, State.DEGRADED, State.FAILING, State.PAUSED})
TRANSITIONS: dict[State, frozenset[State]] = {
    State.STARTING: _AT_WORK | {State.DRAINING},
    State.READY: (_AT_WORK - {State.READY}) | {State.DRAINING},
    State.DEGRADED: (_AT_WORK - {State.DEGRADED}) | {State.DRAINING},
    State.FAILING: (_AT_WORK - {State.FAILING}) | {State.DRAINING},
    State.PAUSED: (_AT_WORK - {State.PAUSED}) | {State.DRAINING},
    State.DRAINING: frozenset({State.STOPPED}),
    State.STOPPED: frozenset(),
}


class Severity(IntEnum):
    DEGRADED = 1
    UNREADY = 2
    FATAL = 3  # not live


class Code:
    """What a state's reason begins with: few, so that they can be a metric's label."""

    OK = "ok"
    STARTING = "starting"
    PAUSED = "paused"
    DRAINING = "draining"
    STOPPED = "stopped"
    STALLED = "stalled"
    DEAD = "dead"
    LATE = "late"
    BUSY = "busy"
    LIVELOCKED = "livelocked"
    CANARY = "canary"
    UNPROVEN = "unproven"
    HELD = "held"
    MEMORY = "memory"
    REQUIRED = "required"
    IMPAIRED = "impaired"


class Finding(msgspec.Struct, frozen=True):
    severity: Severity
    code: str
    reason: str


class Transition(msgspec.Struct, frozen=True):
    old: State
    new: State
    code: str
    reason: str
    at_ms: int
    lasted_ms: int  # the old state

    @property
    def why(self) -> str:
        return why(self.code, self.reason)


class Phase(Enum):
    """What was asked of the server; later ones win."""

    STARTING = State.STARTING
    WORKING = State.READY
    PAUSED = State.PAUSED
    DRAINING = State.DRAINING
    STOPPED = State.STOPPED


class Verdict(msgspec.Struct, frozen=True):
    state: State
    code: str
    reason: str
    since_ms: int
    judged_ms: int
    started: bool
    findings: tuple[Finding, ...]
    transitions: tuple[Transition, ...]  # the last ones, oldest first
    transition_counts: Mapping[tuple[str, str, str], int]  # (from, to, code)


class Health:
    def __init__(self, now_ms: int, on_transition: Callable[[Transition], None]) -> None:
        self._on_transition = on_transition
        self._state = State.STARTING
        self._code, self._reason = Code.STARTING, "the server is starting"
        self._since_ms = now_ms
        self._started = False
        self._ring: deque[Transition] = deque(maxlen=TRANSITIONS_KEPT)
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._stalled: frozenset[str] = frozenset()
        self._dump_at_ms = now_ms
        self._dumps = 0
        self._findings: tuple[Finding, ...] = ()
        self.verdict = self._publish(now_ms)

    def judge(self, phase: Phase, findings: Sequence[Finding], now_ms: int) -> Verdict:
        self._findings = tuple(sorted(findings, key=lambda finding: -finding.severity))
        self._started = self._started or phase is not Phase.STARTING
        if phase is Phase.STOPPED and self._state is not State.STOPPED:
            self._enter(Phase.DRAINING, now_ms)  # which may have been shorter than a turn
        self._enter(phase, now_ms)
        self.verdict = self._publish(now_ms)
        return self.verdict

    def _enter(self, phase: Phase, now_ms: int) -> None:
        state, code, reason = self._now(phase)
        if state is not self._state:
            self._become(state, code, reason, now_ms)
        self._code, self._reason = code, reason

    @property
    def dumps(self) -> int:
        return self._dumps

    def wants_dump(self, judged: Mapping[str, Judgement], now_ms: int) -> list[str]:
        """The parts whose stall is news, and worth the stacks of all threads."""
        stalled = frozenset(name for name, each in judged.items() if each.motion is Motion.STALLED)
        news, self._stalled = sorted(stalled - self._stalled), stalled
        if not news or now_ms < self._dump_at_ms:
            return []
        self._dump_at_ms = now_ms + DUMP_GAP_MS
        self._dumps += 1
        return news

    def _now(self, phase: Phase) -> tuple[State, str, str]:
        match phase:
            case Phase.STOPPED:
                return State.STOPPED, Code.STOPPED, "the server has stopped"
            case Phase.DRAINING:
                return State.DRAINING, Code.DRAINING, "asked to stop: leases may end, nothing new begins"
            case Phase.STARTING:
                return State.STARTING, Code.STARTING, "the server is starting"
            case Phase.PAUSED:
                return State.PAUSED, Code.PAUSED, "an operator has paused it: `cache-server resume` ends that"
            case Phase.WORKING:
                if not self._findings:
                    return State.READY, Code.OK, ""
                worst = self._findings[0]
                state = State.DEGRADED if worst.severity is Severity.DEGRADED else State.FAILING
                return state, worst.code, worst.reason

    def _become(self, state: State, code: str, reason: str, now_ms: int) -> None:
        assert state in TRANSITIONS[self._state], f"{self._state} -> {state}"
        transition = Transition(self._state, state, code, reason, now_ms, now_ms - self._since_ms)
        self._state, self._since_ms = state, now_ms
        self._ring.append(transition)
        self._counts[transition.old.value, state.value, code] += 1
        self._on_transition(transition)

    def _publish(self, now_ms: int) -> Verdict:
        return Verdict(
            state=self._state,
            code=self._code,
            reason=self._reason,
            since_ms=self._since_ms,
            judged_ms=now_ms,
            started=self._started,
            findings=self._findings,
            transitions=tuple(self._ring),
            transition_counts=dict(self._counts),
        )


def findings_of(parts: Sequence[Part], judged: Mapping[str, Judgement]) -> list[Finding]:
    """What the parts' motion means for the whole."""
    found = (_finding(part, judged[part.name]) for part in parts)
    return [finding for finding in found if finding is not None]


def _finding(part: Part, judged: Judgement) -> Finding | None:
    motion, bounds = judged.motion, part.bounds
    moved = f"{part.name}: has not moved for {_seconds(judged.unmoved_ms)}"
    graver = Severity.FATAL if part.critical else Severity.DEGRADED
    match motion:
        case Motion.DEAD:
            return Finding(graver, Code.DEAD, f"{part.name}: its thread is dead")
        case Motion.STALLED:
            return Finding(graver, Code.STALLED, f"{moved}, allowed are {_seconds(bounds.stall_ms)}")
        case Motion.LIVELOCKED:
            reason = f"{part.name}: moves, but its oldest work is {_seconds(judged.outstanding_ms)} old"
            return Finding(Severity.DEGRADED, Code.LIVELOCKED, reason)
        case Motion.LATE if part.critical:
            return Finding(Severity.UNREADY, Code.LATE, f"{moved}, expected are {_seconds(bounds.late_ms)}")
        case Motion.LEASED if part.critical and judged.unmoved_ms > bounds.late_ms:
            return Finding(Severity.UNREADY, Code.BUSY, f"{part.name}: busy with {judged.lease!r}")
        case _:
            return None


def canary_findings(
    record: Record, rules: TrialRules, judged: Judgement, proven_ms: int | None, now_ms: int
) -> list[Finding]:
    """A canary's failure takes readiness away, and never liveness: a restart would not mend what it found."""
    if record.failed and record.last is not None:
        reason = f"failed at {record.last.stage}, {record.failures} in a row: {record.last.reason}"
        return [Finding(Severity.UNREADY, Code.CANARY, reason)]
    if judged.motion not in (Motion.DEAD, Motion.STALLED) or not rules.idle_ms:
        return []
    seen = [time for time in (record.good_ms, proven_ms) if time is not None]
    if seen and now_ms - max(seen) <= rules.failure_found_within_ms:
        return []
    return [Finding(Severity.UNREADY, Code.UNPROVEN, "no canary runs, and no traffic has proven the path")]


def hold_findings(holds: Sequence[Hold]) -> list[Finding]:
    return [Finding(Severity.UNREADY, Code.HELD, f"by {hold.owner}: {hold.reason}") for hold in holds]


def endpoint_findings(endpoints: Endpoints | None) -> list[Finding]:
    if endpoints is None:
        return []
    found = (
        (Severity.UNREADY, Code.MEMORY, endpoints.failed_tier),
        (Severity.UNREADY, Code.REQUIRED, endpoints.unmet),
        (Severity.DEGRADED, Code.IMPAIRED, endpoints.impaired),
    )
    return [Finding(severity, code, reason) for severity, code, reason in found if reason]


def fatal(findings: Sequence[Finding]) -> Finding | None:
    """Why the process is not live, if it is not."""
    return next((finding for finding in findings if finding.severity is Severity.FATAL), None)


def is_ready(verdict: Verdict, *, ready_while_starting: bool) -> bool:
    if verdict.state is State.STARTING:
        return ready_while_starting
    return verdict.state in (State.READY, State.DEGRADED)


def why(code: str, reason: str) -> str:
    return f"{code}: {reason}" if reason else code


def _seconds(ms: int) -> str:
    return f"{ms / 1_000:.1f} s"
