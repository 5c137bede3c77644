"""Whether a campaign was passed, and what each kind of fault has cost.  Pure."""

import statistics
from collections.abc import Iterator, Sequence
from itertools import groupby

from msgspec import Struct

from chaos.campaign.plan import FAULTS, NONE, After, Found
from chaos.campaign.record import End, Outcome, Played, Request, Sample, Seen
from lmconnector.timing import Timing

STUCK_S = 20.0  # no request may take as long
CLOSED_S = 0.3  # from the end of a connection to the shut gate
SLACK_S = 1.5  # a machine's with fewer cores than busy processes
NEW_SERVER_S = 2.0  # for its registration, beside two beats
FILES_MORE_MAX = THREADS_MORE_MAX = SHARED_MORE_MAX = 4
SLOPE_MAX_MIB = 5.0  # in an hour
SLOPE_FROM_S = 1_500.0  # in less time a slope says nothing
HEALTHY = "healthy"
TOKENS_OF_A_CLASS = 256


class Figures(Struct, frozen=True):
    """Of several values; seconds or ms, as its name says."""

    p50: float
    p99: float
    most: float


class Row(Struct, frozen=True, kw_only=True):
    """All faults of one kind."""

    kind: str
    what: str
    count: int
    requests: int
    hits: int
    left: int
    failed: int
    wrong: int
    stuck: int
    added_ms: Figures | None  # beyond what the like took when nothing was done
    found_s: Figures | None  # until the gate was shut; none: it stayed open
    found: int  # how many were
    back_s: Figures | None  # from the fault's end to the open gate
    hit_s: Figures | None  # ... to the first hit


class Drift(Struct, frozen=True, kw_only=True):
    """What one process of the engine, or all lives of the server, held: first, most, last."""

    process: str
    files: tuple[int, int, int]
    threads: tuple[int, int, int]
    shared: tuple[int, int, int]
    rss_mib: tuple[float, float, float]
    rss_mib_per_hour: float | None


class Report(Struct, frozen=True, kw_only=True):
    seed: int
    seconds: float
    faults: int
    faults_per_hour: float
    requests: int
    hits: int
    left: int
    failed: int
    wrong: int
    stuck: int
    other_logprobs: int
    breaches: list[str]
    rows: list[Row]
    drifts: list[Drift]
    not_run: tuple[str, ...]


def judge(seen: Seen, timing: Timing) -> Report:
    usual = Usual(seen)
    rows = [_row(seen, usual, kind) for kind in FAULTS if any(each.step.kind == kind for each in seen.played)]
    drifts = [_drift(process, samples, seen.seconds) for process, samples in _by_process(seen.samples)]
    faults = sum(each.step.kind != NONE for each in seen.played)
    count = {outcome: sum(each.outcome is outcome for each in seen.requests) for outcome in Outcome}
    return Report(
        seed=seen.seed,
        seconds=round(seen.seconds, 1),
        faults=faults,
        faults_per_hour=round(3_600 * faults / seen.seconds, 1),
        requests=len(seen.requests),
        hits=sum(each.hit for each in seen.requests),
        left=count[Outcome.LEFT],
        failed=count[Outcome.FAILED],
        wrong=count[Outcome.WRONG],
        stuck=sum(each.took_s >= STUCK_S for each in seen.requests),
        other_logprobs=sum(not each.same_logprobs for each in seen.requests),
        breaches=[
            *_of_requests(seen.requests), *_of_steps(seen, timing), *_of_drifts(drifts), *_of_the_end(seen)
        ],
        rows=rows,
        drifts=drifts,
        not_run=seen.not_run,
    )  # fmt: skip


class Usual:
    """How long the like of a request takes when nothing is done: as many tokens, from the cache or not."""

    def __init__(self, seen: Seen) -> None:
        calm = [(0.0, min((each.began_s for each in seen.played), default=seen.seconds))]
        calm += [(each.began_s, each.end_s) for each in seen.played if each.step.kind == NONE]
        self._like: dict[tuple[int, int, bool], float] = {}
        within = [each for each in seen.requests if any(a <= each.at_s and each.end_s <= b for a, b in calm)]
        served = [each for each in within if each.outcome is Outcome.RIGHT]
        for like, those in groupby(sorted(served, key=_like), _like):
            self._like[like] = statistics.median(each.took_s for each in those)

    def added_ms(self, request: Request) -> float | None:
        usual_s = self._like.get(_like(request))
        return None if usual_s is None else 1_000 * (request.took_s - usual_s)


def _like(request: Request) -> tuple[int, int, bool]:
    return request.answer_tokens, request.prompt_tokens // TOKENS_OF_A_CLASS, request.hit


def _row(seen: Seen, usual: Usual, kind: str) -> Row:
    played = [each for each in seen.played if each.step.kind == kind]
    requests = [request for each in played for request in _during(seen.requests, each)]
    served = [each for each in requests if each.outcome is not Outcome.LEFT]
    added_ms = [added for each in served if (added := usual.added_ms(each)) is not None]
    found_s = [found for each in played if (found := found_after_s(seen, each)) is not None]
    return Row(
        kind=kind,
        what=FAULTS[kind].what,
        count=len(played),
        requests=len(requests),
        hits=sum(each.hit for each in requests),
        left=sum(each.outcome is Outcome.LEFT for each in requests),
        failed=sum(each.outcome is Outcome.FAILED for each in requests),
        wrong=sum(each.outcome is Outcome.WRONG for each in requests),
        stuck=sum(each.took_s >= STUCK_S for each in requests),
        added_ms=figures(added_ms, 0),
        found_s=figures(found_s),
        found=len(found_s),
        back_s=figures([back_after_s(seen, each) for each in played]) if found_s else None,
        hit_s=figures([each.hit_s - each.healed_s for each in played if each.hit_s is not None]),
    )


def _during(requests: Sequence[Request], played: Played) -> list[Request]:
    """Those that it may have met."""
    return [each for each in requests if each.at_s <= played.end_s and each.end_s >= played.began_s]


def _span(seen: Seen, played: Played) -> tuple[float, float]:
    """From its beginning to the next one's."""
    later = [each.began_s for each in seen.played if each.began_s > played.began_s]
    return played.began_s, min(later, default=seen.seconds)


def found_after_s(seen: Seen, played: Played) -> float | None:
    """Until the engine shut its gate, if it did; whoever comes while it is shut is found already."""
    began_s, until_s = _span(seen, played)
    states = seen.states()
    before = next((state for at_s, state, _ in reversed(states) if at_s <= began_s), HEALTHY)
    if before != HEALTHY:
        return 0.0
    shut = (at_s - began_s for at_s, state, _ in states if began_s < at_s < until_s and state != HEALTHY)
    return next(shut, None)


def back_after_s(seen: Seen, played: Played) -> float:
    """From the fault's end to the last opening of the gate before the next one; 0: it was open."""
    _, until_s = _span(seen, played)
    opened = [
        at_s for at_s, state, _ in seen.states() if played.healed_s < at_s < until_s and state == HEALTHY
    ]
    return opened[-1] - played.healed_s if opened else 0.0


def _of_requests(requests: Sequence[Request]) -> Iterator[str]:
    for each in requests:
        if each.outcome in (Outcome.FAILED, Outcome.WRONG):
            yield f"a request at {each.at_s:.1f} s: {each.outcome.value} {each.error}".rstrip()
        if each.took_s >= STUCK_S:
            yield f"a request at {each.at_s:.1f} s took {each.took_s:.1f} s"


def _of_steps(seen: Seen, timing: Timing) -> Iterator[str]:
    for played in seen.played:
        name = f"{played.step.kind} at {played.began_s:.1f} s (step {played.step.number})"
        if played.hit_s is None:
            yield f"{name}: no hit after it"
        if played.step.with_:
            continue  # the connection was slow as well: what has no bound alone has none together
        yield from (f"{name}: {late}" for late in _late(seen, played, timing))


def _late(seen: Seen, played: Played, timing: Timing) -> Iterator[str]:
    fault = FAULTS[played.step.kind]
    lasted_s = played.healed_s - played.began_s
    allowed_s = found_within_s(fault.found, timing)
    found_s = found_after_s(seen, played)
    if allowed_s is not None and lasted_s > allowed_s and (found_s is None or found_s > allowed_s):
        told = "not found" if found_s is None else f"found after {found_s:.1f} s"
        yield f"{told}, allowed are {allowed_s:.1f} s"
    allowed_s, back_s = back_within_s(fault.after, timing), back_after_s(seen, played)
    if allowed_s is not None and back_s > allowed_s:
        yield f"usable again after {back_s:.1f} s, allowed are {allowed_s:.1f} s"


def found_within_s(found: Found, timing: Timing) -> float | None:
    bounds_s = {
        Found.BY_CLOSED_CONNECTION: CLOSED_S + SLACK_S,
        Found.BY_SILENCE: timing.hang_found_within_ms / 1_000 + SLACK_S,
    }
    return bounds_s.get(found)


def back_within_s(after: After, timing: Timing) -> float | None:
    bounds_s = {
        After.NEW: 2 * timing.interval_ms / 1_000 + NEW_SERVER_S + SLACK_S,
        After.SAME: (timing.hold_ms_max + timing.hang_found_within_ms) / 1_000 + SLACK_S,
    }
    return bounds_s.get(after)


def _by_process(samples: Sequence[Sample]) -> Iterator[tuple[str, list[Sample]]]:
    ordered = sorted(samples, key=lambda each: (each.process, each.at_s))
    for process, those in groupby(ordered, lambda each: each.process):
        yield process, list(those)


def _drift(process: str, samples: list[Sample], seconds: float) -> Drift:
    def three(values: list[int]) -> tuple[int, int, int]:
        return values[0], max(values), values[-1]

    rss = [each.rss_mib for each in samples]
    one_life = len({each.pid for each in samples}) == 1
    return Drift(
        process=process,
        files=three([each.files for each in samples]),
        threads=three([each.threads for each in samples]),
        shared=three([each.shared for each in samples]),
        rss_mib=(rss[0], max(rss), rss[-1]),
        rss_mib_per_hour=slope_per_hour(samples) if one_life and seconds >= SLOPE_FROM_S else None,
    )


def slope_per_hour(samples: Sequence[Sample]) -> float | None:
    """By least squares, after the first quarter: at first caches fill."""
    first_s, last_s = samples[0].at_s, samples[-1].at_s
    late = [each for each in samples if each.at_s >= first_s + (last_s - first_s) / 4]
    if len(late) < 3:
        return None
    line = statistics.linear_regression([each.at_s for each in late], [each.rss_mib for each in late])
    return round(3_600 * line.slope, 1)


def _of_drifts(drifts: Sequence[Drift]) -> Iterator[str]:
    for drift in drifts:
        for name, most in (
            ("files", FILES_MORE_MAX),
            ("threads", THREADS_MORE_MAX),
            ("shared", SHARED_MORE_MAX),
        ):
            first, _, last = getattr(drift, name)
            if last > first + most:
                yield f"{drift.process}: {name} {first} -> {last}"
        if drift.rss_mib_per_hour is not None and drift.rss_mib_per_hour > SLOPE_MAX_MIB:
            yield f"{drift.process}: its memory grows by {drift.rss_mib_per_hour} MiB in an hour"


def _of_the_end(seen: Seen) -> Iterator[str]:
    for name in End.__struct_fields__:
        if value := getattr(seen.end, name):
            yield f"at the end: {name} = {value}"


def figures(values: Sequence[float], digits: int = 2) -> Figures | None:
    if not values:
        return None
    ordered = sorted(values)
    at = [ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.99)]
    return Figures(*(round(value, digits) + 0.0 for value in (*at, ordered[-1])))  # + 0.0: no -0
