"""What passes a campaign and what does not: each bound is broken once."""

import pytest
from msgspec.structs import replace

from chaos.campaign.plan import FAULTS, NONE, After, Found
from chaos.campaign.record import End, Outcome, Seen
from chaos.campaign.samples import AT_REST, change, played, request, sample, seen
from chaos.campaign.verdict import (
    SLOPE_FROM_S,
    STUCK_S,
    Figures,
    Report,
    back_within_s,
    figures,
    found_within_s,
    judge,
    slope_per_hour,
)
from lmconnector.timing import Timing

TIMING = Timing()
KILL = played("killed", 20.0, 24.0, 25.0)
CALM = played(NONE, 10.0, 14.0, 14.2, number=1)
SHUT_AND_OPEN = (change(20.1, "degraded"), change(24.5, "recovering"), change(24.6, "healthy"))


def report(of: Seen) -> Report:
    return judge(of, TIMING)


def breaches(of: Seen) -> list[str]:
    return report(of).breaches


def test_a_campaign_without_a_flaw_passes() -> None:
    requests = [request(float(at)) for at in range(90)]
    found = report(seen(requests, [CALM, KILL], SHUT_AND_OPEN, [sample(5.0), sample(90.0)]))
    assert found.breaches == []
    assert (found.faults, found.requests, found.hits) == (1, 90, 90)
    assert found.faults_per_hour == 36.0


@pytest.mark.parametrize(
    ("flawed", "words"),
    [
        (request(3.0, outcome=Outcome.FAILED, error="OSError: gone"), "at 3.0 s: failed OSError: gone"),
        (request(3.0, outcome=Outcome.WRONG), "at 3.0 s: wrong"),
        (request(3.0, STUCK_S), "took 20.0 s"),
    ],
    ids=["failed", "wrong", "stuck"],
)
def test_a_request_that_is_not_well_served_is_a_breach(flawed, words) -> None:
    [breach] = breaches(seen([request(1.0), flawed]))
    assert words in breach


def test_whoever_hangs_up_is_no_failure_and_in_no_figure() -> None:
    left = request(21.0, 3.0, outcome=Outcome.LEFT)
    found = report(seen([request(1.0), left, request(22.0)], [KILL], SHUT_AND_OPEN))
    [row] = found.rows
    assert (found.breaches, found.left, row.left) == ([], 1, 1)
    assert row.added_ms == Figures(0, 0, 0)


def test_added_time_is_beyond_that_of_the_like_when_nothing_was_done() -> None:
    calm = [request(1.0, 0.2), request(2.0, 0.3), request(3.0, 0.4), request(4.0, 1.0, cached_tokens=0)]
    meanwhile = [request(21.0, 0.35), request(22.0, 1.5, cached_tokens=0), request(23.0, answer_tokens=64)]
    [row] = report(seen([*calm, *meanwhile], [KILL], SHUT_AND_OPEN)).rows
    assert row.added_ms == Figures(500, 500, 500)  # 50 and 500; of 64 tokens there is nothing to compare with
    assert (row.requests, row.hits) == (3, 2)


def test_a_closed_connection_is_to_be_found_at_once() -> None:
    late = (change(23.0, "degraded"), change(24.6, "healthy"))
    [breach] = breaches(seen([], [KILL], late))
    assert breach == "killed at 20.0 s (step 2): found after 3.0 s, allowed are 1.8 s"
    [breach] = breaches(seen([], [KILL]))
    assert "not found" in breach


def test_silence_is_to_be_found_when_it_lasts() -> None:
    long, short = played("frozen", 20.0, 35.0, 36.0), played("frozen", 20.0, 22.0, 23.0)
    assert breaches(seen([], [short])) == []
    assert ["not found" in breach for breach in breaches(seen([], [long]))] == [True]
    assert breaches(seen([], [long], [change(22.0, "degraded"), change(36.0, "healthy")])) == []


def test_a_fault_that_need_not_be_met_need_not_be_found() -> None:
    assert breaches(seen([], [played("loss", 20.0, 28.0, 29.0)])) == []


def test_a_new_server_is_to_be_used_soon_and_the_same_one_when_its_hold_is_over() -> None:
    opened = [change(20.1, "degraded"), change(34.0, "healthy")]
    for kind, breach_count in (("killed", 1), ("cut", 0)):
        assert len(breaches(seen([], [played(kind, 20.0, 24.0, 35.0)], opened))) == breach_count


def test_what_meets_a_bad_connection_as_well_has_no_bound_but_that_hits_come_back() -> None:
    assert breaches(seen([], [played("killed", 20.0, 24.0, 35.0, with_="loss")])) == []
    [breach] = breaches(seen([], [played("killed", 20.0, 24.0, None, with_="loss")]))
    assert breach.endswith("no hit after it")


def test_what_counts_is_the_last_opening_before_the_next_fault() -> None:
    changes = [
        *SHUT_AND_OPEN, change(26.0, "suspect"), change(27.0, "healthy"),
        change(50.3, "degraded"), change(51.4, "healthy"),
    ]  # fmt: skip
    faults = [KILL, played("drained", 50.0, 51.0, 52.0), played("loss", 60.0, 61.0, 62.0)]
    killed, drained, lost = report(seen([], faults, changes)).rows
    assert (killed.found_s, killed.back_s) == (Figures(0.1, 0.1, 0.1), Figures(3.0, 3.0, 3.0))
    assert (drained.found_s, drained.back_s) == (Figures(0.3, 0.3, 0.3), Figures(0.4, 0.4, 0.4))
    assert (lost.found, lost.found_s, lost.back_s) == (0, None, None)


def test_a_gate_that_is_shut_already_has_found_the_fault() -> None:
    before = [change(15.0, "degraded"), change(24.5, "healthy")]
    [row] = report(seen([], [KILL], before)).rows
    assert row.found_s == Figures(0.0, 0.0, 0.0)


def test_the_engine_is_as_well_as_its_worst_process() -> None:
    changes = [
        change(-0.9, "healthy", "Worker pid=42"), change(20.2, "degraded", "Worker pid=42"),
        change(24.4, "healthy", "Worker pid=42"),
    ]  # fmt: skip
    [row] = report(seen([], [KILL], changes)).rows
    assert (row.found_s, row.back_s) == (Figures(0.2, 0.2, 0.2), Figures(0.4, 0.4, 0.4))


@pytest.mark.parametrize("held", ["files", "threads", "shared"])
def test_what_grows_is_a_breach(held: str) -> None:
    few, more = sample(5.0, **{held: 10}), sample(90.0, **{held: 15})
    assert breaches(seen([], samples=[few, more])) == [f"EngineCore: {held} 10 -> 15"]
    assert breaches(seen([], samples=[few, replace(more, **{held: 14})])) == []


def test_memory_that_grows_is_a_breach_when_there_was_time_to_tell() -> None:
    growing = [sample(float(at), rss_mib=500 + at / 100) for at in range(0, 3_600, 60)]
    assert breaches(seen([], samples=growing, seconds=3_600)) == [
        "EngineCore: its memory grows by 36.0 MiB in an hour"
    ]
    assert breaches(seen([], samples=growing, seconds=SLOPE_FROM_S - 1)) == []
    others = [replace(each, pid=each.pid + at) for at, each in enumerate(growing)]
    assert breaches(seen([], samples=others, seconds=3_600)) == [], "each is another life"


def test_a_slope_leaves_the_first_quarter_out() -> None:
    filling = [sample(float(at), rss_mib=min(100.0 + at, 600.0)) for at in range(0, 2_400, 10)]
    assert slope_per_hour(filling) == 0.0
    assert slope_per_hour(filling[:2]) is None


@pytest.mark.parametrize("what", End.__struct_fields__)
def test_what_is_left_at_the_end_is_a_breach(what: str) -> None:
    value = ("filler",) if what == "files" else 1
    assert breaches(seen([], end=replace(AT_REST, **{what: value}))) == [f"at the end: {what} = {value}"]


def test_every_way_to_be_found_and_to_come_back_has_its_bound() -> None:
    assert {found: found_within_s(found, TIMING) for found in Found} == {
        Found.BY_CLOSED_CONNECTION: 1.8, Found.BY_SILENCE: 4.1, Found.BY_CHANCE: None,
    }  # fmt: skip
    assert {after: back_within_s(after, TIMING) for after in After} == {
        After.NEW: 5.5, After.SAME: 34.1, After.UNHURT: None,
    }  # fmt: skip


def test_figures_are_percentiles() -> None:
    assert figures([]) is None
    assert "-0" not in str(figures([-0.3], 0))
    assert figures([3.0, 1.0, 2.0]) == Figures(2.0, 3.0, 3.0)
    assert figures(list(range(1_000))) == Figures(500, 990, 999)


def test_a_row_for_each_kind_in_the_order_of_the_plan() -> None:
    kinds = ["cut", "killed", NONE]
    rows = report(
        seen([], [played(kind, 20.0 + 10 * at, 21.0 + 10 * at, 22.0) for at, kind in enumerate(kinds)])
    ).rows
    assert [row.kind for row in rows] == [NONE, "killed", "cut"]
    assert [row.what for row in rows] == [FAULTS[row.kind].what for row in rows]
