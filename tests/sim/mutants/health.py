"""Planted bugs in the server's health, for the swarm over it."""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import msgspec

from cache_server.answers import Facts
from cache_server.beats import Awake, Beat, Bounds, Judgement, Motion, Part
from cache_server.health import Finding, Health, Phase, Severity, Transition, Verdict, fatal, is_ready
from cache_server.trials import Outcome, Record, Result, TrialRules, Trials

NEVER_MS = 10**12


class FindsNothing(Health):
    def judge(self, phase: Phase, findings: Sequence[Finding], now_ms: int) -> Verdict:
        return super().judge(phase, [], now_ms)


class ForgivesNothing(Health):
    """What was found once stays."""

    def __init__(self, now_ms: int, on_transition: Callable[[Transition], None]) -> None:
        super().__init__(now_ms, on_transition)
        self._ever: dict[str, Finding] = {}

    def judge(self, phase: Phase, findings: Sequence[Finding], now_ms: int) -> Verdict:
        self._ever |= {finding.code: finding for finding in findings if finding.severity is Severity.UNREADY}
        return super().judge(phase, list(self._ever.values()), now_ms)


class TellsTheMildest(Health):
    def judge(self, phase: Phase, findings: Sequence[Finding], now_ms: int) -> Verdict:
        return super().judge(phase, sorted(findings, key=lambda finding: finding.severity)[:1], now_ms)


class SeesOnly(Part):
    """Not a mutant itself: another motion in place of one."""

    motions: ClassVar[Mapping[Motion, Motion]] = {}

    def judge(self, now_ms: int, awake_ms: int) -> Judgement:
        judged = super().judge(now_ms, awake_ms)
        return judged._replace(motion=self.motions.get(judged.motion, judged.motion))


class NeverStalls(SeesOnly):
    motions: ClassVar = {Motion.STALLED: Motion.LATE}


class NeverLate(SeesOnly):
    motions: ClassVar = {Motion.LATE: Motion.MOVING}


class TakesTheDeadForIdle(SeesOnly):
    motions: ClassVar = {Motion.DEAD: Motion.IDLE}


class StallsWhenLate(SeesOnly):
    motions: ClassVar = {Motion.LATE: Motion.STALLED}


class BlamesTheSleeper(Part):
    """For the time in which the whole process was stopped."""

    def judge(self, now_ms: int, awake_ms: int) -> Judgement:
        return super().judge(now_ms, 0)


class BlamesTheLeased(Part):
    def judge(self, now_ms: int, awake_ms: int) -> Judgement:
        leases, self.leases = self.leases, ()
        judged = super().judge(now_ms, awake_ms)
        self.leases = leases
        return judged


class TrustsEndedLeases(Part):
    def judge(self, now_ms: int, awake_ms: int) -> Judgement:
        leases = self.leases
        self.leases = tuple(lease._replace(until_ms=NEVER_MS) for lease in leases)
        judged = super().judge(now_ms, awake_ms)
        self.leases = leases
        return judged


class WaitsForWork(Part):
    """A part that need not work need not turn."""

    def _outstanding_since(self, beat: Beat, now_ms: int) -> int | None:
        return beat.since_ms


class IsAlwaysCritical(Part):
    def __init__(self, name: str, bounds: Bounds, *, critical: bool) -> None:
        super().__init__(name, bounds, critical=True)


class IsNeverCritical(Part):
    def __init__(self, name: str, bounds: Bounds, *, critical: bool) -> None:
        super().__init__(name, bounds, critical=False)


class IsPatient(Part):
    """Twice as long as it was told to be."""

    def __init__(self, name: str, bounds: Bounds, *, critical: bool) -> None:
        patient = msgspec.structs.replace(bounds, late_ms=2 * bounds.late_ms, stall_ms=2 * bounds.stall_ms)
        super().__init__(name, patient, critical=critical)


class CondemnsAtOnce(Trials):
    def record(self) -> Record:
        return msgspec.structs.replace(super().record(), failed=self._failures > 0)


class NeverCondemns(Trials):
    def record(self) -> Record:
        return msgspec.structs.replace(super().record(), failed=False)


class CountsOneMore(Trials):
    def __init__(self, rules: TrialRules, now_ms: int) -> None:
        super().__init__(msgspec.structs.replace(rules, fail_after=rules.fail_after + 1), now_ms)


class NeverTriesAgain(Trials):
    """After a verdict."""

    def is_due(self, now_ms: int, proven_ms: int | None) -> bool:
        return not self.record().failed and super().is_due(now_ms, proven_ms)


class ExcusesSilence(Trials):
    def end(self, generation: int, outcome: Outcome, now_ms: int, leased_ms: int = -1) -> bool:
        if outcome.unanswered:
            outcome = msgspec.structs.replace(outcome, result=Result.EXCUSED)
        return super().end(generation, outcome, now_ms, leased_ms)


class CountsAllFailures(Trials):
    """Not only those in a row."""

    def _conclude(self, outcome: Outcome, now_ms: int, leased_ms: int) -> None:
        failures = self._failures
        super()._conclude(outcome, now_ms, leased_ms)
        self._failures = max(failures, self._failures)


class NeverSleeps(Awake):
    def note(self, now_ms: int) -> int:
        return 0


class HasJustWokenUp(Awake):
    def note(self, now_ms: int) -> int:
        return now_ms


class LivesByTheVerdict(Facts):
    """Of a watch that may be dead."""

    @property
    def live(self) -> bool:
        return fatal(self.verdict.findings) is None

    @property
    def fresh(self) -> list[Finding]:
        return list(self.verdict.findings)


class IsReadyByTheVerdict(Facts):
    @property
    def ready(self) -> bool:
        return is_ready(self.verdict, ready_while_starting=self.ready_while_starting)
