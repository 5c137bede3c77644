"""What the doctor's findings look like, and what they come to."""

import json

import pytest

from lmconnector.doctor.findings import Finding, Verdict, as_json, fail, ok, skip, warn, worst

FINE = ok("server", "answers")
POOR = warn("round trip", "p50 5000 µs", "give it a core")
BAD = fail("arena", "gone", "restart it")
BLIND = skip("chunk", "no arena")


def test_a_line_shows_verdict_check_what_was_found_and_what_to_do() -> None:
    assert str(FINE) == "OK    server         answers"
    assert str(POOR) == "WARN  round trip     p50 5000 µs -> give it a core"
    assert str(BLIND) == "SKIP  chunk          not looked at: no arena"


@pytest.mark.parametrize(
    ("findings", "verdict"),
    [
        ([], Verdict.OK),
        ([FINE, BLIND], Verdict.OK),
        ([FINE, POOR], Verdict.WARN),
        ([BAD, POOR, FINE], Verdict.FAIL),
    ],
)
def test_the_worst_counts(findings: list[Finding], verdict: Verdict) -> None:
    assert worst(findings) is verdict


def test_machines_get_the_same() -> None:
    report = json.loads(as_json([FINE, BAD]))
    assert report["verdict"] == "FAIL"
    assert report["findings"][1] == {
        "check": "arena",
        "verdict": "FAIL",
        "found": "gone",
        "advice": "restart it",
    }
