"""vLLM's log lines as changes of health; what is not one is left alone."""

import logging

import pytest

from lmconnector.demo.healthlog import plain, read_change
from lmconnector.demo.timeline import STATES, Change
from lmconnector.health import State, Timing
from lmconnector.heartbeat import Heartbeat
from lmconnector.link import Link

HEAD = "(EngineCore pid=6822) WARNING 11-21 10:38:32 [heartbeat.py:186] "


def test_a_change_is_read_with_its_process_and_reason() -> None:
    line = f'{HEAD}health: healthy -> degraded why="connection closed" lasted_ms=99725'
    assert read_change(line, 4.5) == Change(4.5, "EngineCore pid=6822", "degraded", "connection closed")


def test_a_process_without_a_name_has_the_empty_one() -> None:
    assert read_change('health: degraded -> recovering why="it answers"', 1) == Change(
        1, "", "recovering", "it answers"
    )


@pytest.mark.parametrize(
    "line",
    [
        "",
        f"{HEAD}options: dir=/dev/shm/x, heartbeat_interval_s=1.0",
        'INFO: 127.0.0.1:35156 - "GET /health HTTP/1.1" 200 OK',
        'health: healthy -> bewildered why="no such state"',
    ],
)
def test_other_lines_are_no_change(line: str) -> None:
    assert read_change(line, 0) is None


def test_what_the_heartbeat_logs_is_read(caplog: pytest.LogCaptureFixture) -> None:
    def no_link() -> Link:
        raise AssertionError("this heartbeat never begins")

    def no_registration() -> None:
        raise AssertionError("this heartbeat never begins")

    beat = Heartbeat(no_link, no_registration, Timing())
    with caplog.at_level(logging.INFO):
        beat.health.start(0)
        beat.health.on_recovered(1, 7, "", 5)
        beat.health.on_disconnected(9)
    changes = [read_change(record.getMessage(), 0) for record in caplog.records]
    assert [(each.state, each.why) for each in changes if each] == [
        ("recovering", "first use"),
        ("healthy", "registered"),
        ("degraded", "connection closed"),
    ]


def test_every_state_has_its_rank() -> None:
    assert set(STATES) == {state.value for state in State}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (f"{HEAD}Loading weights took 0.15 seconds\n", "Loading weights took 0.15 seconds"),
        ("INFO 11-21 10:38:32 [core/loader.py:9] Starting", "Starting"),
        ("  Triton is installed\n", "Triton is installed"),
        ("INFO:     Application startup complete.", "INFO:     Application startup complete."),
        ("", ""),
    ],
)
def test_a_line_is_shown_without_who_said_it_and_when(line: str, says: str) -> None:
    assert plain(line) == says
