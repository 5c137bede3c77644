"""A campaign as a picture: every request, the faults by kind, the engine's health, memory.  Pure."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from chaos.campaign.plan import FAULTS, NONE
from chaos.campaign.record import Outcome, Played, Request, Sample, Seen
from chaos.campaign.verdict import Report
from lmconnector.demo.svg import STYLE, box, text, tip

WIDTH = 1_280
LEFT, RIGHT = 196, 1_256
REQUESTS_TOP, REQUESTS_BOTTOM = 112, 292
LEAST_MS, MOST_MS = 10, 20_000
TICKS_MS = {10: "10 ms", 100: "100 ms", 1_000: "1 s", 10_000: "10 s"}
HEALTH_TOP, HEALTH_BOTTOM = 306, 326
FAULTS_TOP, LANE = 344, 14
MEMORY = 80
WIDTH_MIN = 2.0
MORE_STYLE = """\
.fault { fill: #bf8700 } .with { fill: #8250df }
.line { fill: none; stroke-width: 1.5; stroke: #2f6fdf }"""


class Axes:
    def __init__(self, seconds: float) -> None:
        self._seconds = max(seconds, 1.0)
        self.step_s = next(step for step in (10, 60, 300, 600, 1_800, 36_000) if self._seconds <= 12 * step)

    def x(self, at_s: float) -> float:
        return LEFT + (RIGHT - LEFT) * min(1.0, max(0.0, at_s / self._seconds))

    @property
    def ticks_s(self) -> range:
        return range(0, int(self._seconds) + 1, self.step_s)


def picture(seen: Seen, report: Report) -> str:
    axes = Axes(seen.seconds)
    kinds = [kind for kind in FAULTS if kind != NONE and any(each.step.kind == kind for each in seen.played)]
    memory_top = FAULTS_TOP + LANE * len(kinds) + 28
    height = memory_top + MEMORY + 40
    parts = [
        box("card", 0.5, 0.5, WIDTH - 1, height - 1),
        *_words(report),
        *_grid(axes, height - 40),
        *(part for request in seen.requests for part in _request(axes, request)),
        *_health(axes, seen),
        *(part for lane, kind in enumerate(kinds) for part in _lane(axes, seen.played, lane, kind)),
        *_memory(axes, seen.samples, memory_top),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{escape(summary(report))}">'
    )
    return "\n".join([head, f"<style>{STYLE}\n{MORE_STYLE}</style>", *parts, "</svg>", ""])


def summary(report: Report) -> str:
    return (
        f"{report.faults} faults in {report.seconds / 60:.0f} minutes; {report.requests} requests, "
        f"{report.hits} from the cache: {report.failed} failed, {report.wrong} wrong, {report.stuck} stuck."
    )


def _words(report: Report) -> Iterable[str]:
    yield text(24, 34, "Everything fails; vLLM serves on", "title ink")
    broken = f" Breaches: {len(report.breaches)}." if report.breaches else ""
    yield text(24, 56, f"{summary(report)}{broken} Seed {report.seed}.", "faint")
    x = LEFT
    for kind, name in (
        ("computed", "computed by vLLM"), ("hit", "loaded from the cache"), ("failed", "failed or wrong"),
        ("fault", "fault"), ("with", "with a bad connection"), ("healthy", "healthy"),
        ("degraded", "degraded"), ("suspect", "suspect"), ("recovering", "recovering"),
    ):  # fmt: skip
        yield box(kind, x, 76, 11, 11)
        yield text(x + 16, 86, name, "small ink")
        x += 34 + 7 * len(name)


def _grid(axes: Axes, bottom: float) -> Iterable[str]:
    for ms, name in TICKS_MS.items():
        yield f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{_y(ms):.1f}" y2="{_y(ms):.1f}"/>'
        yield text(LEFT - 8, _y(ms) + 4, name, "small faint end")
    for at_s in axes.ticks_s:
        name = f"{at_s} s" if axes.step_s < 60 else f"{at_s // 60} min"
        yield text(axes.x(at_s), bottom + 20, name, "small faint middle")
    yield text(24, REQUESTS_TOP + 4, "a request took", "small ink")
    yield text(24, HEALTH_BOTTOM - 6, "the engine's health", "small ink")


def _y(ms: float) -> float:
    share = math.log(min(MOST_MS, max(LEAST_MS, ms)) / LEAST_MS) / math.log(MOST_MS / LEAST_MS)
    return REQUESTS_BOTTOM - (REQUESTS_BOTTOM - REQUESTS_TOP) * share


def _request(axes: Axes, request: Request) -> Iterable[str]:
    if request.outcome is Outcome.LEFT:
        return
    bad = request.outcome is not Outcome.RIGHT
    kind = "failed" if bad else "hit" if request.hit else "computed"
    told = tip(f"at {request.at_s:.1f} s: {request.outcome.value} {request.error}") if bad else ""
    x, y = axes.x(request.at_s), _y(1_000 * request.took_s)
    yield f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{4 if bad else 1.6}">{told}</circle>'


def _health(axes: Axes, seen: Seen) -> Iterable[str]:
    """What is seldom is drawn last, so that it is seen."""
    states = [(max(0.0, at_s), state) for at_s, state, _ in seen.states()]
    ends_s = [at_s for at_s, _ in states[1:]] + [seen.seconds]
    spans = [(at_s, end_s, state) for (at_s, state), end_s in zip(states, ends_s, strict=True) if end_s > 0]
    for at_s, end_s, state in sorted(spans, key=lambda span: span[0] - span[1]):
        width = max(WIDTH_MIN, axes.x(end_s) - axes.x(at_s))
        yield box(state, axes.x(at_s), HEALTH_TOP, width, HEALTH_BOTTOM - HEALTH_TOP)


def _lane(axes: Axes, played: Sequence[Played], lane: int, kind: str) -> Iterable[str]:
    those = [each for each in played if each.step.kind == kind]
    top = FAULTS_TOP + LANE * lane
    yield text(LEFT - 8, top + 10, f"{kind} ({len(those)})", "small ink end")
    for each in those:
        width = max(WIDTH_MIN, axes.x(each.healed_s) - axes.x(each.began_s))
        with_ = f" with {each.step.with_}" if each.step.with_ else ""
        yield f"<g>{tip(f'{kind}{with_} at {each.began_s:.1f} s: {each.note}')}"
        yield box("with" if with_ else "fault", axes.x(each.began_s), top + 1, width, LANE - 3) + "</g>"


def _memory(axes: Axes, samples: Sequence[Sample], top: float) -> Iterable[str]:
    yield text(24, top - 8, "memory of their own, and open files", "small ink")
    ordered = sorted(samples, key=lambda each: (each.process, each.at_s))
    lanes = [(process, list(those)) for process, those in groupby(ordered, lambda each: each.process)]
    for lane, (process, those) in enumerate(lanes):
        high = MEMORY / len(lanes)
        bottom = top + high * (lane + 1)
        most = max(each.rss_mib for each in those)
        points = " ".join(
            f"{axes.x(each.at_s):.1f},{bottom - 0.8 * high * each.rss_mib / most:.1f}" for each in those
        )
        told = f"{process}: {those[-1].rss_mib:.0f} MiB, {those[-1].files}"
        yield text(LEFT - 8, bottom, told, "small faint end")
        yield f'<polyline class="line" points="{points}"/>'
