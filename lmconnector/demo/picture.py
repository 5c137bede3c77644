"""The run as a picture: each request's time to first token, what came from the cache, and the health.  Pure.

An SVG on a card of its own colour, so that it is readable on any page; where the viewer prefers dark, dark.
"""

from collections.abc import Iterable
from html import escape
from itertools import pairwise

from lmconnector.demo.claims import check, same_tokens
from lmconnector.demo.svg import STYLE, box, text, tip
from lmconnector.demo.timeline import STATES, Phase, Request, Run, Span, typical_ms

WIDTH, HEIGHT = 960, 470
LEFT, RIGHT = 104, 936
PLOT_TOP, PLOT_BOTTOM = 138, 318
SHARE_TOP, SHARE_BOTTOM = 332, 360
BAND_TOP, BAND_BOTTOM = 372, 396
BAR_WIDTH_MIN, BAR_WIDTH_MAX = 3.0, 9.0
SPAN_WIDTH_MIN = 3.0  # recovering takes milliseconds
NAME_WIDTH = 7.0  # of a letter, about
TICKS_MAX = 5
STEPS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))


class Axes:
    def __init__(self, run: Run) -> None:
        self._end_s = max(run.end_s, 1.0)
        worst_ms = max([request.ttft_ms for request in run.requests] + [1.0])
        self.step_ms = next((step for step in STEPS if worst_ms <= TICKS_MAX * step), STEPS[-1])
        self.top_ms: float = self.step_ms * -(-worst_ms // self.step_ms)
        self.step_s = next((step for step in STEPS if self._end_s <= 2 * TICKS_MAX * step), STEPS[-1])
        self.ticks_s = range(0, int(self._end_s) + 1, self.step_s)
        starts_s = sorted(request.start_s for request in run.requests)
        gap_s = min((later - at for at, later in pairwise(starts_s)), default=self._end_s)
        self.bar_width = max(BAR_WIDTH_MIN, min(BAR_WIDTH_MAX, 0.75 * (self.x(gap_s) - LEFT)))

    def x(self, at_s: float) -> float:
        return LEFT + (RIGHT - LEFT - BAR_WIDTH_MAX) * at_s / self._end_s

    def y(self, ttft_ms: float) -> float:
        return PLOT_BOTTOM - (PLOT_BOTTOM - PLOT_TOP) * ttft_ms / self.top_ms


def picture(run: Run) -> str:
    axes = Axes(run)
    parts = [
        *_frame(run),
        *_grid(axes),
        *(part for request in run.requests for part in _request(axes, request)),
        *(part for span in sorted(run.spans(), key=_shortness_s) for part in _span(axes, span)),
        *_marks(axes, run),
        *_words_below(run),
    ]
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img" aria-label="{escape(_text_of(run))}">'
    )
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _frame(run: Run) -> Iterable[str]:
    prompt = next((request.prompt_tokens for request in run.requests if request.prompt_tokens), 0)
    yield f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>'
    yield text(24, 34, "The cache server comes, dies and returns; vLLM serves on", "title ink")
    yield text(24, 56, f"One bar is one request of {prompt} tokens, one at a time. {run.machine}", "faint")
    kinds = [("computed", "computed by vLLM"), ("hit", "loaded from the cache")]
    if any(request.error for request in run.requests):
        kinds.append(("failed", "failed"))
    yield from _legend(LEFT, kinds)
    seen = {span.state for span in run.spans()}
    yield from _legend(LEFT + 400, [(state, state) for state in reversed(STATES) if state in seen])


def _legend(x: float, kinds: Iterable[tuple[str, str]]) -> Iterable[str]:
    for kind, name in kinds:
        yield f'<rect class="{kind}" x="{x:.0f}" y="75" width="11" height="11" rx="2"/>'
        yield text(x + 17, 85, name, "small ink")
        x += 34 + NAME_WIDTH * len(name)


def _grid(axes: Axes) -> Iterable[str]:
    for ttft_ms in range(0, int(axes.top_ms) + 1, axes.step_ms):
        y = axes.y(ttft_ms)
        yield f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield text(LEFT - 8, y + 4, f"{ttft_ms} ms", "small faint end")
    yield text(24, PLOT_TOP - 14, "time to first token", "small ink")
    yield text(LEFT - 8, SHARE_BOTTOM - 9, "from cache", "small ink end")
    yield text(LEFT - 8, BAND_BOTTOM - 8, "health", "small ink end")
    for at_s in axes.ticks_s:
        yield text(axes.x(at_s), BAND_BOTTOM + 18, f"{at_s} s", "small faint middle")


def _request(axes: Axes, request: Request) -> Iterable[str]:
    x, width = axes.x(request.start_s), axes.bar_width
    if request.error:
        yield "<g>" + tip(f"at {request.start_s:.1f} s: {request.error}")
        yield text(x + width / 2, PLOT_BOTTOM - 3, "✕", "failed middle") + "</g>"
        return
    share = request.cached_tokens / max(1, request.prompt_tokens)
    kind = "hit" if request.hit else "computed"
    told = tip(
        f"at {request.start_s:.1f} s, document {request.document + 1}: first token after "
        f"{request.ttft_ms:.0f} ms, {request.cached_tokens} of {request.prompt_tokens} tokens from the cache"
    )
    y, height = axes.y(request.ttft_ms), SHARE_BOTTOM - SHARE_TOP
    yield f"<g>{told}" + box(kind, x, y, width, PLOT_BOTTOM - y)
    yield box("empty", x, SHARE_TOP, width, height)
    if share:
        yield box(kind, x, SHARE_BOTTOM - share * height, width, share * height)
    yield "</g>"


def _shortness_s(span: Span) -> float:
    """The short ones are drawn last, so that they are seen."""
    return span.start_s - span.end_s


def _span(axes: Axes, span: Span) -> Iterable[str]:
    x = axes.x(span.start_s)
    width = max(SPAN_WIDTH_MIN, axes.x(span.end_s) - x)
    told = tip(f"{span.state} from {span.start_s:.1f} s to {span.end_s:.1f} s: {span.why}")
    yield f"<g>{told}" + box(span.state, x, BAND_TOP, width, BAND_BOTTOM - BAND_TOP)
    if width > NAME_WIDTH * len(span.state) + 8:
        yield text(x + width / 2, BAND_BOTTOM - 8, span.state, "small on middle")
    yield "</g>"


def _marks(axes: Axes, run: Run) -> Iterable[str]:
    marks = run.marks
    for at_s, name in (
        (marks.started_s, "server starts"),
        (marks.killed_s, "kill -9"),
        (marks.restarted_s, "server restarts"),
    ):
        if at_s is not None:
            x = axes.x(at_s)
            yield f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{PLOT_TOP - 18}" y2="{BAND_BOTTOM}"/>'
            yield text(x, PLOT_TOP - 24, name, "ink middle")


def _words_below(run: Run) -> Iterable[str]:
    yield f'<line class="grid" x1="24" x2="{RIGHT}" y1="{BAND_BOTTOM + 32}" y2="{BAND_BOTTOM + 32}"/>'
    yield text(24, BAND_BOTTOM + 56, _text_of(run), "ink")


def _text_of(run: Run) -> str:
    failed = sum(bool(request.error) for request in run.requests)
    answers, wrong = same_tokens(run)
    computed, hits = run.answered(Phase, hit=False), run.answered(Phase, hit=True)
    same = "yes" if answers and not wrong else "NO"
    broken = sum(not claim.holds for claim in check(run))
    return (
        f"{len(run.requests)} requests, {failed} failed. Same tokens as without a cache: {same}, "
        f"{len(answers) - len(wrong)} of {len(answers)}. First token, median: {typical_ms(computed):.0f} ms "
        f"computed, {typical_ms(hits):.0f} ms from the cache."
        + (f" Claims broken: {broken}." if broken else "")
    )
