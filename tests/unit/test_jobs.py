"""Copies in the workers' hands: each ends once; what may rest on a failed load fails with it."""

from collections import Counter

import pytest

from lmconnector.jobs import Jobs, Kind
from lmconnector.metadata import Outcome


class Table:
    def __init__(self, workers: int) -> None:
        self.jobs = Jobs(workers)
        self.ends: list[tuple[int, bool]] = []

    def begin(self, kind: Kind, now_ms: int = 0) -> int:
        numbers: list[int] = []
        numbers.append(self.jobs.begin(kind, now_ms, lambda ok: self.ends.append((numbers[0], ok))))
        return numbers[0]

    def ended(self, *numbers: int, failed: tuple[int, ...] = ()) -> None:
        self.jobs.take(Outcome(Counter(dict.fromkeys(numbers, 1)), set(failed)))


def test_a_job_ends_when_the_last_worker_has_ended_it() -> None:
    table = Table(2)
    number = table.begin(Kind.STORE)
    table.ended(number)
    assert table.ends == []
    table.ended(number)
    assert table.ends == [(number, True)]
    assert len(table.jobs) == 0


def test_it_has_failed_if_one_of_them_failed() -> None:
    table = Table(2)
    number = table.begin(Kind.STORE)
    table.ended(number, failed=(number,))
    table.ended(number)
    assert table.ends == [(number, False)]


def test_outcomes_of_ranks_are_gathered_in_one() -> None:
    table = Table(2)
    one, two = table.begin(Kind.STORE), table.begin(Kind.LOAD_BESIDE)
    first = Outcome(Counter({one: 1}), set(), loaded_blocks=3, load_us=30)
    second = Outcome(Counter({one: 1, two: 1}), {two}, loaded_blocks=1, load_us=20)
    gathered = first.merged(second)
    assert (gathered.loaded_blocks, gathered.load_us) == (4, 50)
    table.jobs.take(gathered)
    assert table.ends == [(one, True)]


def test_stores_under_way_fail_with_a_load_that_a_step_stood_on() -> None:
    table = Table(1)
    before, load, later = table.begin(Kind.STORE), table.begin(Kind.LOAD), table.begin(Kind.STORE)
    table.ended(load, failed=(load,))
    table.ended(before, later)
    assert table.ends == [(load, False), (before, False), (later, False)]


def test_they_do_not_fail_with_a_load_beside_the_steps() -> None:
    table = Table(1)
    load, store = table.begin(Kind.LOAD_BESIDE), table.begin(Kind.STORE)
    table.ended(load, store, failed=(load,))
    assert table.ends == [(load, False), (store, True)]


def test_the_order_is_that_in_which_they_were_begun() -> None:
    table = Table(1)
    numbers = [table.begin(Kind.STORE) for _ in range(5)]
    table.ended(*reversed(numbers))
    assert [number for number, _ in table.ends] == numbers


def test_an_error_in_one_keeps_none_of_the_others_from_ending() -> None:
    jobs, ends = Jobs(1), []
    first = jobs.begin(Kind.STORE, 0, ends.append)
    bad = jobs.begin(Kind.STORE, 0, lambda ok: 1 / 0)
    last = jobs.begin(Kind.STORE, 0, ends.append)
    with pytest.raises(ZeroDivisionError):
        jobs.take(Outcome(Counter([first, bad, last])))
    assert ends == [True, True]
    assert len(jobs) == 0


def test_an_end_that_is_told_twice_keeps_none_of_the_others_from_ending() -> None:
    table = Table(1)
    first, last = table.begin(Kind.STORE), table.begin(Kind.LOAD)
    table.ended(first)
    with pytest.raises(AssertionError, match=rf"jobs \[{first}, 99\] were never begun, or are over"):
        table.ended(first, last, failed=(99,))
    assert table.ends == [(first, True), (last, True)]


def test_old_ones_do_not_keep_the_engine_awake() -> None:
    table = Table(1)
    number = table.begin(Kind.STORE, now_ms=1_000)
    assert table.jobs.begun_since(999)
    assert not table.jobs.begun_since(1_000)
    table.ended(number)
    assert not table.jobs.begun_since(0)
