"""The picture of a campaign: well-formed, everything on it, and nothing said that is not so."""

import xml.etree.ElementTree as ET
from itertools import pairwise

from chaos.campaign.picture import LEFT, REQUESTS_BOTTOM, REQUESTS_TOP, RIGHT, picture
from chaos.campaign.plan import NONE
from chaos.campaign.record import Outcome, Seen
from chaos.campaign.samples import change, played, request, sample, seen
from chaos.campaign.verdict import judge
from lmconnector.timing import Timing

SVG = "{http://www.w3.org/2000/svg}"
SEEN = seen(
    [
        request(1.0, 0.02), request(30.0, 5.0, cached_tokens=0),
        request(50.0, outcome=Outcome.FAILED, error="<gone>"), request(60.0, 0.1, outcome=Outcome.LEFT),
        request(99.0, 1_000.0),
    ],
    [
        played(NONE, 5.0, 8.0, 8.5), played("killed", 20.0, 24.0, 25.0),
        played("frozen", 40.0, 60.0, 61.0, with_="loss"), played("killed", 80.0, 80.0, None),
    ],
    [change(20.1, "degraded"), change(24.5, "healthy")],
    [sample(10.0), sample(90.0, rss_mib=510.0), sample(20.0, "cache server"), sample(70.0, "cache server")],
)  # fmt: skip


def drawn(of: Seen) -> ET.Element:
    return ET.fromstring(picture(of, judge(of, Timing())))


def of_class(root: ET.Element, tag: str, kind: str) -> list[ET.Element]:
    return [each for each in root.iter(SVG + tag) if each.get("class") == kind]


def words(root: ET.Element) -> str:
    return "\n".join("".join(each.itertext()) for each in root.iter(SVG + "text"))


def test_every_request_is_a_dot_where_it_belongs_but_for_those_that_left() -> None:
    root = drawn(SEEN)
    dots = list(root.iter(SVG + "circle"))
    assert [each.get("class") for each in dots] == ["hit", "computed", "failed", "hit"]
    across = [float(each.get("cx", 0)) for each in dots]
    assert all(LEFT <= one < other <= RIGHT for one, other in pairwise(across))
    heights = [float(each.get("cy", 0)) for each in dots]
    assert all(REQUESTS_TOP <= each <= REQUESTS_BOTTOM for each in heights)
    assert heights[1] < heights[0], "the slower, the higher"
    assert "<gone>" in "".join(dots[2].itertext())


def test_each_kind_has_a_lane_with_a_bar_for_each_time() -> None:
    root = drawn(SEEN)
    assert "killed (2)" in words(root)
    assert "frozen (1)" in words(root)
    assert "none" not in words(root)
    legend = 1
    assert len(of_class(root, "rect", "fault")) == 2 + legend
    assert len(of_class(root, "rect", "with")) == 1 + legend


def test_bars_are_as_long_as_their_faults() -> None:
    [_, frozen] = of_class(drawn(SEEN), "rect", "with")
    assert abs(float(frozen.get("width", 0)) / (RIGHT - LEFT) - 0.2) < 0.01


def test_health_covers_the_whole_time() -> None:
    root = drawn(SEEN)
    legend = 1
    wide = [
        float(each.get("width", 0))
        for state in ("healthy", "degraded")
        for each in of_class(root, "rect", state)[legend:]
    ]
    assert abs(sum(wide) - (RIGHT - LEFT)) < 1.0


def test_a_line_for_each_process() -> None:
    root = drawn(SEEN)
    assert len(list(root.iter(SVG + "polyline"))) == 2
    assert "EngineCore: 510 MiB" in words(root)


def test_its_words_are_the_verdicts() -> None:
    told = words(drawn(SEEN))
    assert "5 requests, 4 from the cache: 1 failed, 0 wrong, 1 stuck." in told
    assert "Breaches: " in told
    whole = seen(
        [request(1.0)],
        [played("killed", 20.0, 24.0, 25.0)],
        [change(20.1, "degraded"), change(24.5, "healthy")],
    )
    assert "Breaches" not in words(drawn(whole))


def test_a_campaign_of_nothing_can_be_drawn() -> None:
    assert drawn(seen(seconds=0.5)).tag == SVG + "svg"
