"""The pure parts of the end-to-end benchmarks: what is made of their samples."""

import re

from bench.breakdown import BEFORE, CALLS, LAST, Call, stages
from bench.ttft_report import Ask, Way, figures, pictures, table

MS = 1_000_000


def asks(way: Way, variant: str, times_ms: list[float], cell: str = "512 x 1") -> list[Ask]:
    return [Ask(cell, variant, way, number, [each], [511]) for number, each in enumerate(times_ms)]


def test_a_ratio_is_the_median_of_each_round_and_not_of_the_medians() -> None:
    """A machine that is slow for a while is so for both."""
    ours, plain = [10.0, 60.0, 20.0], [10.0, 30.0, 40.0]
    found = figures(asks(Way.EXTERNAL, "lmconnector", ours) + asks(Way.LOCAL, "vLLM", plain))
    ratio = found["cells"]["512 x 1"]["ratios"]["lmconnector / own hit"]
    assert ratio == {"median": 1.0, "least": 0.5, "most": 2.0, "rounds": 3}


def test_rounds_that_only_one_of_them_had_are_not_compared() -> None:
    found = figures(asks(Way.EXTERNAL, "lmconnector", [10.0, 90.0]) + asks(Way.EXTERNAL, "LMCache", [20.0]))
    assert found["cells"]["512 x 1"]["ratios"]["lmconnector / LMCache"]["rounds"] == 1


def test_of_requests_that_come_at_once_the_mean_counts_and_the_last_is_told() -> None:
    found = figures([Ask("512 x 2", "vLLM", Way.COLD, 0, [100.0, 300.0], [0, 0])])
    value = found["cells"]["512 x 2"]["ttft_ms"]["vLLM, cold"]
    assert (value["median"], value["last_ms"]) == (200.0, 300.0)


def test_the_tables_have_as_many_cells_in_each_row_as_in_their_heads() -> None:
    found = figures(asks(Way.COLD, "vLLM", [500.0]) + asks(Way.NEW_PROCESS, "lmconnector", [9.0], "4096 x 1"))
    blocks = "\n".join(table(found)).split("\n\n")
    for block in blocks:
        assert len({line.count("|") for line in block.splitlines()}) == 1
    assert "500 (500..500)" in blocks[0]
    assert "512 x 1" not in blocks[1]


def test_a_picture_has_a_bar_for_each_figure_that_was_measured() -> None:
    found = figures(asks(Way.COLD, "vLLM", [500.0]) + asks(Way.LOCAL, "vLLM", [20.0]))
    svg = pictures(found)["ttft"]
    assert len(re.findall(r'class="spread"', svg)) == 2
    assert "512 tokens" in svg


def test_the_stages_add_up_to_the_whole_time() -> None:
    calls = [
        Call(3 * MS, 4 * MS, "on_new_request"),
        Call(6 * MS, 8 * MS, "get_num_new_matched_tokens"),
        Call(6 * MS + 1, 7 * MS, "start_load_kv"),  # within another one
        Call(11 * MS, 15 * MS, "start_load_kv"),
        Call(90 * MS, 91 * MS, "start_load_kv"),  # of the step after the first token
    ]
    spent = stages(calls, 0, 20 * MS)
    assert spent.total() == 20 * MS
    assert spent[BEFORE["on_new_request"]] == 3 * MS
    assert spent[CALLS["start_load_kv"]] == 4 * MS
    assert spent[LAST] == 5 * MS
