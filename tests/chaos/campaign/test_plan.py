"""The plan of a campaign: the same seed, the same faults; all of them, often enough, and none too long."""

from itertools import islice
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chaos.campaign.deeds import DEEDS
from chaos.campaign.orders import ORDERS
from chaos.campaign.plan import (
    FAULTS,
    MILD,
    NONE,
    NONE_EVERY,
    SAME_SERVER_MAX,
    After,
    Step,
    log_uniform,
    steps,
)

KINDS = tuple(FAULTS)
PER_HOUR_MIN = 200
RECOVERY_S = 4.0  # from a fault's end to a hit, about
SEEDS = st.integers(min_value=0, max_value=2**32)


def first(seed: int, count: int, kinds: tuple[str, ...] = KINDS) -> list[Step]:
    return list(islice(steps(Random(seed), kinds), count))


@given(SEEDS)
def test_all_follows_from_the_seed(seed: int) -> None:
    assert first(seed, 50) == first(seed, 50)
    assert first(seed, 50) != first(seed + 1, 50)


@given(SEEDS)
def test_every_kind_comes_before_any_comes_again_but_for_new_servers(seed: int) -> None:
    kinds = [step.kind for step in first(seed, 3 * len(KINDS)) if step.kind != NONE]
    begun = kinds[: len(kinds) // 2]
    assert set(begun) == set(KINDS) - {NONE}
    again = [
        kind for at, kind in enumerate(begun) if kind in begun[:at] and len(set(begun[:at])) < len(KINDS) - 1
    ]
    assert all(FAULTS[kind].after is After.NEW for kind in again)


@given(SEEDS)
def test_no_server_is_wronged_too_often(seed: int) -> None:
    same = 0
    for step in first(seed, 200):
        after = FAULTS[step.kind].after
        same = 0 if after is After.NEW else same + (after is After.SAME)
        assert same <= SAME_SERVER_MAX


@given(SEEDS)
def test_nothing_is_done_now_and_then_for_comparison(seed: int) -> None:
    assert [step.kind == NONE for step in first(seed, 60)] == [at % NONE_EVERY == 0 for at in range(60)]


@given(SEEDS)
def test_times_keep_to_their_bounds(seed: int) -> None:
    for step in first(seed, 100):
        least, most = FAULTS[step.kind].lasts_s
        assert least - 0.01 <= step.lasts_s <= most + 0.01
        assert not step.with_ or (step.with_ in MILD and not FAULTS[step.kind].of_the_connection)


def test_some_faults_meet_a_bad_connection() -> None:
    apart = [step for step in first(1, 600) if not FAULTS[step.kind].of_the_connection and step.kind != NONE]
    assert 0.1 < sum(bool(step.with_) for step in apart) / len(apart) < 0.3


@pytest.mark.parametrize("seed", range(5))
def test_an_hour_has_two_hundred_faults_and_more(seed: int) -> None:
    hour_s, faults = 0.0, 0
    for step in steps(Random(seed), KINDS):
        hour_s += step.gap_s + step.lasts_s + RECOVERY_S
        if hour_s > 3_600:
            break
        faults += step.kind != NONE
    assert faults >= PER_HOUR_MIN


def test_only_those_that_are_asked_for() -> None:
    assert {step.kind for step in first(1, 30, ("frozen",))} == {NONE, "frozen"}


def test_times_are_spread_over_their_magnitudes() -> None:
    random = Random(1)
    drawn = [log_uniform(random, 1.0, 40.0) for _ in range(2_000)]
    assert 1.0 <= min(drawn) < 1.1
    assert 36.0 < max(drawn) <= 40.0
    assert 0.4 < sum(each < 6.3 for each in drawn) / len(drawn) < 0.6


def test_each_kind_is_done_by_somebody() -> None:
    of_the_connection = {kind for kind, fault in FAULTS.items() if fault.of_the_connection}
    assert set(ORDERS) == of_the_connection
    assert set(DEEDS) == set(FAULTS) - of_the_connection
