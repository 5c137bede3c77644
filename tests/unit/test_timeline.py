"""Phases, references and the engine's health over time."""

import pytest

from demo_run import a_run, change, request
from lmconnector.demo.timeline import Phase, Span, overall, typical_ms, worst_ms


@pytest.mark.parametrize(
    ("start_s", "end_s", "phase"),
    [
        (0.0, 1.0, Phase.ABSENT),
        (9.9, 10.5, Phase.ABSENT),  # it began before there was a server
        (10.0, 10.5, Phase.UP),
        (19.9, 20.1, Phase.AT_KILL),
        (20.0, 20.1, Phase.AT_KILL),
        (20.1, 20.9, Phase.DEAD),
        (29.9, 31.0, Phase.DEAD),
        (30.0, 31.0, Phase.BACK),
    ],
)
def test_a_request_belongs_to_the_phase_in_which_it_began(start_s: float, end_s: float, phase: Phase) -> None:
    assert a_run().phase(request(0, start_s, end_s)) is phase


def test_without_marks_there_was_no_server() -> None:
    run = a_run(started_s=None, killed_s=None, restarted_s=None)
    assert {run.phase(each) for each in run.requests} == {Phase.ABSENT}


def test_a_reference_is_the_first_answer_that_ended_before_the_server_started() -> None:
    run = a_run(
        requests=[
            request(0, 0, 1, tokens=(1,)),
            request(0, 1, 2, tokens=(2,)),
            request(1, 2, 3, cached=64, tokens=(3,)),
            request(1, 9, 11, tokens=(4,)),
            request(2, 3, 4, error="refused"),
        ]
    )
    assert run.references() == {0: (1,)}


def test_the_engine_is_as_well_as_its_worst_process() -> None:
    changes = [
        change(0, "degraded", "Worker pid=1"),
        change(0.5, "degraded", "EngineCore pid=2"),
        change(1, "recovering", "Worker pid=1"),
        change(2, "recovering", "EngineCore pid=2"),
        change(3, "healthy", "EngineCore pid=2"),
        change(4, "healthy", "Worker pid=1"),
        change(5, "suspect", "EngineCore pid=2"),
    ]
    assert [(at_s, state) for at_s, state, _ in overall(changes)] == [
        (0, "degraded"),
        (2, "recovering"),
        (4, "healthy"),
        (5, "suspect"),
    ]


def test_spans_cover_the_run_without_gaps() -> None:
    run = a_run(
        requests=[request(0, 0, 40)],
        changes=[
            change(-3, "recovering"),
            change(-2, "degraded"),
            change(10, "healthy"),
            change(20, "degraded"),
        ],
    )
    assert run.spans() == [
        Span(0.0, 10, "degraded", "because"),
        Span(10, 20, "healthy", "because"),
        Span(20, 40, "degraded", "because"),
    ]
    assert a_run(changes=[]).spans() == []


def test_a_change_is_looked_for_in_its_time() -> None:
    run = a_run()
    assert run.first("degraded", after_s=20, before_s=30) == 20.01
    assert run.first("degraded", after_s=21, before_s=30) is None
    assert run.first("healthy", after_s=30) == 30.4


def test_of_no_request_there_is_no_figure() -> None:
    assert (typical_ms([]), worst_ms([])) == (0.0, 0.0)
