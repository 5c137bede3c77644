"""The benchmarks' picture is well formed, and its bars are as long as what they show."""

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from bench.picture import LEFT, RIGHT, Bar, Chart, bar_of, picture

SVG = "{http://www.w3.org/2000/svg}"
BARS = {"one & two": [Bar(10, 8, 20), Bar(20, 20, 20)], "three": [None, Bar(40, 30, 50)]}


def drawn(chart: Chart) -> ElementTree.Element:
    return ElementTree.fromstring(picture(chart))


def widths(root: ElementTree.Element) -> list[float]:
    return [float(box.attrib["width"]) for box in root.iter(f"{SVG}rect") if box.attrib.get("x") == f"{LEFT}"]


def lines(root: ElementTree.Element, kind: str) -> list[tuple[float, float]]:
    every = root.iter(f"{SVG}line")
    return [(float(e.attrib["x1"]), float(e.attrib["x2"])) for e in every if e.attrib["class"] == kind]


def test_bars_are_as_long_as_their_medians() -> None:
    first, second, third = widths(drawn(Chart("t", "us", ["a", "b"], BARS)))
    assert second == pytest.approx(2 * first, abs=0.2)
    assert third == pytest.approx(4 * first, abs=0.2)


def test_a_line_shows_how_far_the_rounds_lie_apart() -> None:
    root = drawn(Chart("t", "us", ["a", "b"], BARS))
    begin, end = lines(root, "spread")[0]
    assert begin < LEFT + widths(root)[0] < end


def test_on_a_logarithmic_axis_equal_ratios_are_equal_distances() -> None:
    bars = {"x": [Bar(value, value, value) for value in (10, 100, 1_000)]}
    long = widths(drawn(Chart("t", "us", ["a", "b", "c"], bars, logarithmic=True)))
    steps = [later - earlier for earlier, later in pairwise(long)]
    assert steps[0] == pytest.approx(steps[1], abs=0.2)


def test_a_target_that_nothing_reaches_is_on_the_picture() -> None:
    ((at, _),) = lines(drawn(Chart("t", "us", ["a", "b"], BARS, target=400)), "target")
    assert LEFT + widths(drawn(Chart("t", "us", ["a", "b"], BARS, target=400)))[-1] < at <= RIGHT


def test_what_was_not_measured_says_so_and_names_are_escaped() -> None:
    words = [each.text for each in drawn(Chart("t", "us", ["a", "b"], BARS, note="<n>")).iter(f"{SVG}text")]
    assert words.count("not measured") == 1
    assert {"one & two", "three", "<n>", "a", "b"} <= set(words)


def test_figures_of_the_kit_become_bars() -> None:
    assert bar_of({"median": 2.0, "least": 1.0, "most": 3.0}) == Bar(2.0, 1.0, 3.0)
