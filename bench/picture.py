"""Figures as a picture: groups of bars with their spread, as an SVG for light and for dark pages.  Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

WIDTH, LEFT, RIGHT = 760, 210, 650
TOP, BAR, GAP_IN_GROUP, GAP_BETWEEN_GROUPS, BOTTOM = 84, 16, 3, 14, 40
LETTER = 6.6  # the width of one, about
TICKS_MAX = 6
COLOURS = ("#2f6fdf", "#d97706", "#2da44e", "#8250df", "#cf222e", "#0f8b8d", "#8c959f")

STYLE = """\
text { font-family: ui-sans-serif, system-ui, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 12px }
text { fill: #1f2328 } text.faint { fill: #59636e } .title { font-size: 16px; font-weight: 600 }
.card { fill: #ffffff; stroke: #d0d7de }
.end { text-anchor: end } .middle { text-anchor: middle }
.grid { stroke: #d0d7de } .spread { stroke: #1f2328 }
.target { stroke: #cf222e; stroke-dasharray: 4 3 }
@media (prefers-color-scheme: dark) {
text { fill: #f0f6fc } .card { fill: #0d1117; stroke: #3d444d } text.faint { fill: #9198a1 }
.grid { stroke: #3d444d } .spread { stroke: #f0f6fc }
}"""


class Bar(NamedTuple):
    """One measured figure: its median, and how far the single rounds lie apart."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    series: Sequence[str]
    groups: dict[str, Sequence[Bar | None]]  # name -> a bar for each series; None: not measured
    logarithmic: bool = False
    target: float | None = None  # a line across all of them
    note: str = ""


def bar_of(spread: dict[str, float]) -> Bar:
    """From what `bench.kit.spread` says."""
    return Bar(spread["median"], spread["least"], spread["most"])


class Axis:
    def __init__(self, chart: Chart) -> None:
        bars = [bar for group in chart.groups.values() for bar in group if bar is not None]
        ends = [end for bar in bars for end in (bar.least, bar.most)]
        if chart.target is not None:
            ends.append(chart.target)
        if chart.logarithmic:
            positive = [end for end in ends if end > 0] or [1.0]
            low, high = math.floor(math.log10(min(positive))), math.ceil(math.log10(max(positive)))
            self.ticks = [10.0**power for power in range(low, max(high, low + 1) + 1)]
        else:
            step = _step(max([*ends, 0.0]) or 1.0)
            self.ticks = [step * number for number in range(math.ceil(max(ends, default=step) / step) + 1)]
        self._logarithmic = chart.logarithmic

    def x(self, value: float) -> float:
        first, last = self._scaled(self.ticks[0]), self._scaled(self.ticks[-1])
        share = (self._scaled(max(value, self.ticks[0])) - first) / (last - first)
        return LEFT + (RIGHT - LEFT) * share

    def _scaled(self, value: float) -> float:
        return math.log10(value) if self._logarithmic else value


def picture(chart: Chart) -> str:
    axis = Axis(chart)
    bottom = TOP + sum(_height(chart) + GAP_BETWEEN_GROUPS for _ in chart.groups)
    height = bottom + BOTTOM
    parts = [
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
        _text(20, 30, chart.title, "title"),
        _text(20, 50, chart.note, "faint"),
        *_legend(chart),
        *_grid(axis, chart, bottom),
    ]
    y = float(TOP)
    for name, bars in chart.groups.items():
        parts.append(_text(LEFT - 10, y + _height(chart) / 2 + 4, name, "end"))
        for number, bar in enumerate(bars):
            at_y = y + number * (BAR + GAP_IN_GROUP)
            parts += _bar(axis, at_y, COLOURS[number % len(COLOURS)], bar)
        y += _height(chart) + GAP_BETWEEN_GROUPS
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" role="img" aria-label="{escape(chart.title)}">'
    )
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _height(chart: Chart) -> int:
    return len(chart.series) * (BAR + GAP_IN_GROUP) - GAP_IN_GROUP


def _step(most: float) -> float:
    """The least of 1, 2, 5, 10, 20, … that needs no more ticks than fit."""
    power = 10.0 ** math.floor(math.log10(most / TICKS_MAX))
    return next(step * power for step in (1, 2, 5, 10) if most / (step * power) <= TICKS_MAX)


def _legend(chart: Chart) -> list[str]:
    if len(chart.series) == 1:
        return []
    x, parts = 20.0, []
    for number, name in enumerate(chart.series):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<rect fill="{colour}" x="{x:.0f}" y="60" width="11" height="11" rx="2"/>')
        parts.append(_text(x + 16, 70, name, ""))
        x += 34 + LETTER * len(name)
    return parts


def _grid(axis: Axis, chart: Chart, bottom: float) -> list[str]:
    parts = []
    for tick in axis.ticks:
        x = axis.x(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{bottom}"/>')
        parts.append(_text(x, bottom + 18, _number(tick), "faint middle"))
    parts.append(_text(RIGHT + 30, bottom + 18, chart.unit, "faint"))
    if chart.target is not None:
        x = axis.x(chart.target)
        parts.append(f'<line class="target" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 6}" y2="{bottom}"/>')
    return parts


def _bar(axis: Axis, y: float, colour: str, bar: Bar | None) -> list[str]:
    middle = y + BAR / 2
    if bar is None:
        return [_text(LEFT + 4, middle + 4, "not measured", "faint")]
    least, end, most = axis.x(bar.least), axis.x(bar.median), axis.x(bar.most)
    return [
        f'<rect fill="{colour}" x="{LEFT}" y="{y:.1f}" width="{end - LEFT:.1f}" height="{BAR}" rx="2"/>',
        f'<line class="spread" x1="{least:.1f}" x2="{most:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>',
        _text(max(end, most) + 6, middle + 4, _number(bar.median), ""),
    ]


def _number(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>' if text else ""
