"""The demo's picture is well formed, and draws what was measured."""

from xml.etree import ElementTree

import pytest

from demo_run import a_run, change, request
from lmconnector.demo.picture import BAND_BOTTOM, BAND_TOP, HEIGHT, LEFT, PLOT_BOTTOM, RIGHT, WIDTH, picture
from lmconnector.demo.timeline import Run

SVG = "{http://www.w3.org/2000/svg}"


def drawn(run: Run) -> ElementTree.Element:
    return ElementTree.fromstring(picture(run))


def texts(root: ElementTree.Element) -> list[str]:
    return [each.text or "" for each in root.iter(f"{SVG}text")]


def boxes(root: ElementTree.Element, kind: str) -> list[dict[str, float]]:
    """Of the drawing, without the legend."""
    return [
        {name: float(box.attrib[name]) for name in ("x", "y", "width", "height")}
        for group in root.iter(f"{SVG}g")
        for box in group.iter(f"{SVG}rect")
        if box.attrib["class"] == kind
    ]


def bars(root: ElementTree.Element, kind: str) -> list[dict[str, float]]:
    return [
        box for box in boxes(root, kind) if box["y"] + box["height"] == pytest.approx(PLOT_BOTTOM, abs=0.2)
    ]


def test_every_request_is_a_bar_as_high_as_it_was_slow() -> None:
    run = a_run(
        requests=[
            request(0, 0, 1, ttft_ms=1_000),
            request(0, 2, 3, ttft_ms=500),
            request(0, 12, 13, ttft_ms=100, cached=512),
        ]
    )
    slow, half = bars(drawn(run), "computed")
    (hit,) = bars(drawn(run), "hit")
    assert half["height"] == pytest.approx(slow["height"] / 2, abs=0.2)
    assert hit["height"] == pytest.approx(slow["height"] / 10, abs=0.2)
    assert slow["x"] == LEFT
    assert slow["x"] < half["x"] < hit["x"]


def test_a_hit_shows_how_much_came_from_the_cache() -> None:
    root = drawn(a_run(requests=[request(0, 12, 13, cached=300)]))
    whole = boxes(root, "empty")[0]["height"]
    share = min(boxes(root, "hit"), key=lambda box: box["height"])
    assert share["height"] == pytest.approx(whole / 2, abs=0.1)  # 300 of 600 tokens


def test_a_failed_request_is_a_cross_with_its_reason() -> None:
    root = drawn(a_run(requests=[request(0, 0, 1), request(0, 2, 3, error="it's <gone> & lost")]))
    assert "✕" in texts(root)
    assert "failed" in texts(root)
    assert "at 2.0 s: it's <gone> & lost" in [each.text for each in root.iter(f"{SVG}title")]
    assert "✕" not in texts(drawn(a_run()))


def test_the_band_shows_the_health_in_its_order() -> None:
    root = drawn(a_run())
    bands = {
        kind: [box["x"] for box in boxes(root, kind) if box["y"] == BAND_TOP]
        for kind in ("degraded", "recovering", "healthy")
    }
    assert {kind: len(found) for kind, found in bands.items()} == {
        "degraded": 2,
        "recovering": 2,
        "healthy": 2,
    }
    assert bands["degraded"][0] < bands["recovering"][0] < bands["healthy"][0] < bands["degraded"][1]
    assert texts(root).count("degraded") == 3, "the legend, and two spans wide enough for their name"


def test_marks_are_where_and_only_when_it_happened() -> None:
    assert {"server starts", "kill -9", "server restarts"} <= set(texts(drawn(a_run())))
    never = drawn(a_run(started_s=None, killed_s=None, restarted_s=None))
    assert not {"server starts", "kill -9", "server restarts"} & set(texts(never))
    lines = [each for each in drawn(a_run()).iter(f"{SVG}line") if each.attrib["class"] == "mark"]
    assert [float(each.attrib["y2"]) for each in lines] == [BAND_BOTTOM] * 3
    assert sorted(float(each.attrib["x1"]) for each in lines) == [float(each.attrib["x1"]) for each in lines]


def test_the_words_below_are_counted() -> None:
    below = texts(drawn(a_run()))[-1]
    assert below.startswith("12 requests, 0 failed. Same tokens as without a cache: yes, 10 of 10.")
    assert "500 ms computed, 50 ms from the cache" in below
    run = a_run()
    run.requests.append(request(0, 40, 41, tokens=(0, 0)))
    assert "without a cache: NO, 10 of 11" in texts(drawn(run))[-1]
    assert "Claims broken: 1." in texts(drawn(run))[-1]


@pytest.mark.parametrize(
    "run",
    [
        a_run(),
        a_run(requests=[], changes=[], started_s=None, killed_s=None, restarted_s=None),
        a_run(requests=[request(0, 0, 0.001, ttft_ms=0.4)]),
        a_run(requests=[request(0, 3 * each, 3 * each + 2, ttft_ms=90_000) for each in range(500)]),
        a_run(changes=[change(0.1 * each, ("healthy", "degraded")[each % 2]) for each in range(300)]),
    ],
    ids=["good", "empty", "tiny", "long", "flapping"],
)
def test_all_that_is_drawn_lies_on_the_card(run: Run) -> None:
    for box in drawn(run).iter(f"{SVG}rect"):
        x, y, width, height = (float(box.attrib[name]) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + width <= WIDTH
        assert 0 <= y <= y + height <= HEIGHT
        assert width > 0
    for line in drawn(run).iter(f"{SVG}line"):
        assert float(line.attrib["x2"]) <= RIGHT


def test_it_is_readable_in_the_dark() -> None:
    assert "prefers-color-scheme: dark" in picture(a_run())
