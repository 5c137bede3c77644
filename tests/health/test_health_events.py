"""The bench of health events: what is said too late, never, or out of turn is found in what was seen."""

from types import SimpleNamespace

import pytest

from bench.health_events import complaints, rows, table
from bench.health_experiments import BEGIN, END, Bound, Experiment
from bench.health_probes import Answer, Log

BOUNDS = (Bound("/live", "503 stalled", 10_000), Bound("/live", "200 ok", 100, END))
MOMENTS = SimpleNamespace(moments={BEGIN: 100.0, END: 160.0})


class Standstill(Experiment):
    name = "standstill"


def seen(*changes: tuple[float, str], until_s: float = 165.0) -> Log:
    """An answer every 50 ms, each there at once."""
    log = Log()
    for (since_s, said), (next_s, _) in zip(changes, [*changes[1:], (until_s, "")], strict=True):
        count = round((next_s - since_s) / 0.05)
        log.answers += [
            Answer(since_s + each * 0.05, since_s + each * 0.05 + 0.001, said) for each in range(count)
        ]
    return log


AS_DOCUMENTED = seen((95.0, "200 ok"), (110.0, "503 stalled"), (160.05, "200 ok"))


def judged(log: Log) -> list[str]:
    return complaints(Standstill(), "/live", log, MOMENTS, BOUNDS)


def test_what_is_said_in_time_is_no_complaint() -> None:
    assert judged(AS_DOCUMENTED) == []


@pytest.mark.parametrize(
    ("log", "complaint"),
    [
        (
            seen((95.0, "200 ok"), (111.0, "503 stalled"), (160.05, "200 ok")),
            "10950 ms after the begin, not 10000",
        ),
        (seen((95.0, "200 ok"), (110.0, "503 stalled"), (161.0, "200 ok")), "950 ms after the end, not 100"),
        (seen((95.0, "200 ok")), "said '503 stalled' never after the begin"),
        (seen((95.0, "200 ok"), (110.0, "503 stalled")), "said '200 ok' never after the end"),
        (
            seen((95.0, "200 ok"), (105.0, "no answer"), (110.0, "503 stalled"), (160.05, "200 ok")),
            "said 'no answer'",
        ),
    ],
)
def test_what_is_late_missing_or_uncalled_for_is_a_complaint(log: Log, complaint: str) -> None:
    found = judged(log)
    assert complaint in found[0]


def test_each_change_is_a_row_with_its_time_and_its_bound() -> None:
    found = rows("standstill", "/live", AS_DOCUMENTED, MOMENTS, BOUNDS)
    assert [(row.said, row.since, row.after_ms, row.within_ms) for row in found] == [
        ("503 stalled", BEGIN, (9_950, 10_001), 10_000),
        ("200 ok", END, (0, 51), 100),
    ]
    assert table(found)[2:] == [
        "| standstill | /live    | 503 stalled | 9.95..10.00 s              | 10 s  |",
        "| standstill | /live    | 200 ok      | 0.00..0.05 s after its end | 0.1 s |",
    ]


def test_an_endpoint_that_says_the_same_throughout_has_one_row() -> None:
    [row] = rows("standstill", "/startup", seen((95.0, "200 ok")), MOMENTS, BOUNDS)
    assert (row.said, row.after_ms) == ("200 ok", None)
