"""The demo's table: one row for each state of the server and source of the prompt, with its own figures."""

from demo_run import a_run, request
from lmconnector.demo.table import table


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("   ", "  ").split("  ") if cell.strip()]


def test_each_row_counts_its_own_requests() -> None:
    assert [cells(line) for line in table(a_run())[1:]] == [
        ["cache server", "prompt", "requests", "failed", "median", "worst"],
        ["none yet", "computed", "2", "0", "500 ms", "500 ms"],
        ["up", "computed", "2", "0", "500 ms", "500 ms"],
        ["up", "from the cache", "2", "0", "50 ms", "50 ms"],
        ["killed while it ran", "computed", "1", "0", "500 ms", "500 ms"],
        ["dead", "computed", "2", "0", "500 ms", "500 ms"],
        ["restarted", "computed", "1", "0", "500 ms", "500 ms"],
        ["restarted", "from the cache", "2", "0", "50 ms", "50 ms"],
    ]


def test_a_failed_request_is_counted_and_has_no_time() -> None:
    run = a_run(
        requests=[
            request(0, 0, 1, ttft_ms=100),
            request(0, 1, 2, ttft_ms=300),
            request(0, 2, 3, error="gone"),
            request(0, 21, 22, error="gone"),
        ]
    )
    assert [cells(line) for line in table(run)[2:]] == [
        ["none yet", "computed", "3", "1", "200 ms", "300 ms"],
        ["dead", "computed", "1", "1", "-", "-"],
    ]


def test_all_lines_end_in_the_same_column() -> None:
    assert len({len(line) for line in table(a_run())[1:]}) == 1
