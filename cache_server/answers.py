"""What the HTTP side says about health: JSON of schema 1.  Pure.

Every answer begins with the same fields.  Durations are in seconds, by the monotonic clock: when the
wall clock jumps, nothing here changes.
"""

from collections.abc import Mapping, Sequence

import msgspec

from cache_server.beats import Judgement, Lease, Part
from cache_server.endpoints import Endpoints
from cache_server.health import Finding, Severity, State, Transition, Verdict, fatal, findings_of, is_ready
from cache_server.holds import Hold
from cache_server.trials import Record, Result

SCHEMA = 1
OK, UNAVAILABLE = 200, 503
PASSED = (Result.OK, Result.NO_ROOM)
JSON = "application/json"
Fields = dict[str, object]


class Answer(msgspec.Struct, frozen=True):
    code: int
    content_type: str
    body: bytes
    headers: tuple[str, ...] = ()  # beyond those that every answer has


class Facts(msgspec.Struct, frozen=True):
    """All that is known at the moment of the answer; the parts were judged for it."""

    now_ms: int
    born_ms: int
    boot: int
    ready_while_starting: bool
    asked_to_stop: bool
    verdict: Verdict
    parts: Sequence[Part]
    judged: Mapping[str, Judgement]
    endpoints: Endpoints | None
    record: Record
    holds: Sequence[Hold]
    config_hash: str

    @property
    def fresh(self) -> list[Finding]:
        return sorted(findings_of(self.parts, self.judged), key=lambda finding: -finding.severity)

    @property
    def trouble(self) -> Finding | None:
        """Why it is not ready, beyond what the last verdict says."""
        fresh = [finding for finding in self.fresh if finding.severity >= Severity.UNREADY]
        return fresh[0] if fresh else None

    @property
    def ready(self) -> bool:
        verdict_ready = is_ready(self.verdict, ready_while_starting=self.ready_while_starting)
        return verdict_ready and not self.asked_to_stop and self.trouble is None

    @property
    def live(self) -> bool:
        return fatal(self.fresh) is None


def live(facts: Facts) -> Answer:
    worst = fatal(facts.fresh)
    if worst is None:
        return _json(OK, _head(facts, "live", "ok", ""))
    return _json(UNAVAILABLE, _head(facts, "dead", worst.code, worst.reason))


def ready(facts: Facts) -> Answer:
    code, reason = _cause(facts)
    if facts.ready:
        return _json(OK, _head(facts, "ready", code, reason))
    return _json(UNAVAILABLE, _head(facts, "unready", code, reason))


def startup(facts: Facts) -> Answer:
    if facts.verdict.started:
        return _json(OK, _head(facts, "started", "ok", ""))
    return _json(UNAVAILABLE, _head(facts, "starting", facts.verdict.code, facts.verdict.reason))


def health(facts: Facts) -> Answer:
    return _json(OK if facts.ready else UNAVAILABLE, _everything(facts))


def deep(facts: Facts, generation: int) -> Answer:
    """After the run that was asked for, or its deadline."""
    done = facts.record.generation >= generation
    good = done and facts.record.last is not None and facts.record.last.result in PASSED
    fields = _everything(facts)
    if not good:
        last = facts.record.last
        told = f"failed at {last.stage}: {last.reason}" if done and last else "no outcome within the deadline"
        fields |= {"code": "canary", "reason": told}
    return _json(OK if good and facts.ready else UNAVAILABLE, fields)


def events(facts: Facts) -> Answer:
    verdict = facts.verdict
    rows = [_event(transition, facts) for transition in reversed(verdict.transitions)]
    return _json(OK, _head(facts, verdict.state.value, *_cause(facts)) | {"events": rows})


def _cause(facts: Facts) -> tuple[str, str]:
    trouble = facts.trouble
    if facts.asked_to_stop and facts.verdict.state not in (State.DRAINING, State.STOPPED):
        return "draining", "asked to stop"
    if trouble is not None and facts.verdict.state in (State.READY, State.DEGRADED, State.FAILING):
        return trouble.code, trouble.reason
    return facts.verdict.code, facts.verdict.reason


def _head(facts: Facts, status: str, code: str, reason: str) -> Fields:
    return {
        "schema": SCHEMA,
        "status": status,
        "code": code,
        "reason": reason,
        "state": facts.verdict.state.value,
        "since_s": _seconds(facts.now_ms - facts.verdict.since_ms),
        "uptime_s": _seconds(facts.now_ms - facts.born_ms),
        "boot": f"{facts.boot:016x}" if facts.boot else None,
        "live": facts.live,
        "ready": facts.ready,
    }


def _everything(facts: Facts) -> Fields:
    endpoints = facts.endpoints
    rows: Fields = {"engines": [], "workers": [], "tiers": []}
    if endpoints is not None:
        rows = {
            "engines": [_aged(msgspec.structs.asdict(row), facts) for row in endpoints.engines],
            "workers": [_aged(msgspec.structs.asdict(row), facts) for row in endpoints.workers],
            "tiers": [_aged(msgspec.structs.asdict(row), facts) for row in endpoints.tiers],
        }
    return {
        **_head(facts, facts.verdict.state.value, *_cause(facts)),
        "findings": [
            {"severity": finding.severity.name.lower(), "code": finding.code, "reason": finding.reason}
            for finding in facts.verdict.findings
        ],
        "components": [_part(part, facts) for part in facts.parts],
        **rows,
        "holds": [_hold(hold, facts) for hold in facts.holds],
        "canary": _canary(facts),
        "config": facts.config_hash,
    }


def _part(part: Part, facts: Facts) -> Fields:
    judged, beat = facts.judged[part.name], part.beat
    return {
        "component": part.name,
        "critical": part.critical,
        "state": judged.motion.value,
        "unmoved_s": _seconds(judged.unmoved_ms),
        "outstanding_s": _seconds(judged.outstanding_ms),
        "late_after_s": _seconds(part.bounds.late_ms),
        "stall_after_s": _seconds(part.bounds.stall_ms),
        "epoch": beat.epoch if beat else 0,
        "ticks": beat.ticks if beat else 0,
        "finished": beat.finished if beat else 0,
        "leases": [_lease(lease, facts) for lease in part.leases],
    }


def _lease(lease: Lease, facts: Facts) -> Fields:
    return {"name": lease.name, "left_s": _seconds(max(0, lease.until_ms - facts.now_ms))}


def _hold(hold: Hold, facts: Facts) -> Fields:
    left_s = _seconds(max(0, hold.until_ms - facts.now_ms))
    return {"owner": hold.owner, "reason": hold.reason, "left_s": left_s}


def _canary(facts: Facts) -> Fields:
    record = facts.record
    last = record.last
    fields: Fields = {
        "generation": record.generation,
        "running": record.running,
        "failures": record.failures,
        "failed": record.failed,
        "late": record.late,
    }
    if last is None:
        return {**fields, "last": None}
    told = {"result": last.result.value, "stage": last.stage, "reason": last.reason}
    ago_s = _seconds(facts.now_ms - record.last_ms)
    return {**fields, "last": {**told, "took_s": _seconds(last.took_ms), "ago_s": ago_s}}


def _event(transition: Transition, facts: Facts) -> Fields:
    return {
        "ago_s": _seconds(facts.now_ms - transition.at_ms),
        "uptime_s": _seconds(transition.at_ms - facts.born_ms),
        "from": transition.old.value,
        "to": transition.new.value,
        "code": transition.code,
        "reason": transition.reason,
        "lasted_s": _seconds(transition.lasted_ms),
    }


def _aged(row: Mapping[str, object], facts: Facts) -> Fields:
    """Moments become ages: `pinged_ms` becomes `pinged_s`, so long ago."""
    return {
        (f"{name[:-3]}_s" if name.endswith("_ms") else name): (
            _seconds(facts.now_ms - value) if name.endswith("_ms") and isinstance(value, int) else value
        )
        for name, value in row.items()
    }


def _seconds(ms: int) -> float:
    return ms / 1_000


def _json(code: int, fields: Fields) -> Answer:
    return Answer(code, JSON, msgspec.json.encode(fields))
