"""What `lmconnector bench` makes of its figures."""

import json

from lmconnector.bench.rows import Report, alone, as_json, beside

FAST = beside("load", "GB/s", [8.0, 10.0, 9.0], "memcpy", [10.0, 10.0, 12.0])
ALONE = alone("registration", "ms", [150.0, 250.0, 210.4])


def test_shares_are_those_of_neighbouring_rounds_not_of_the_medians() -> None:
    assert FAST.share is not None
    assert (FAST.share.least, FAST.share.median, FAST.share.most) == (0.75, 0.8, 1.0)
    assert (FAST.ours.least, FAST.ours.median, FAST.ours.most) == (8.0, 9.0, 10.0)


def test_a_line_shows_both_with_their_spread_and_the_share() -> None:
    words = str(FAST).split()
    assert words == ["load", "9.0", "(8.0..10.0)", "GB/s", "memcpy", "10.0", "(10.0..12.0)", "0.80x"]


def test_what_stands_alone_has_no_share() -> None:
    assert str(ALONE).split() == ["registration", "210", "(150..250)", "ms"]


def test_machines_get_the_same() -> None:
    report = json.loads(as_json(Report("1.2.3", "a machine", "a server", [FAST, ALONE])))
    assert report["version"] == "1.2.3", "figures of two versions are to be told apart"
    assert report["machine"] == "a machine"
    assert report["rows"][0]["share"] == {"median": 0.8, "least": 0.75, "most": 1.0}
    assert report["rows"][1]["share"] is None
