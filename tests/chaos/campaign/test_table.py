"""The words of a campaign: faults as they happen, a table, and what was not as promised."""

from random import Random

import pytest

from chaos.campaign.orders import ORDERS, in_words
from chaos.campaign.plan import FAULTS
from chaos.campaign.record import Outcome
from chaos.campaign.samples import change, played, request, sample, seen
from chaos.campaign.table import sentences, tables, told
from chaos.campaign.verdict import judge
from chaos.campaign.wire import CLEAN, Order, Rules
from lmconnector.timing import Timing


def test_a_fault_is_one_line() -> None:
    assert told(played("frozen", 20.0, 24.0, 25.5, with_="loss")) == (
        "   20.0 s    2 frozen with loss: 4.0 s, hit after 1.5 s"
    )
    assert told(played("frozen", 20.0, 24.0, None)).endswith("frozen: 4.0 s, no hit")


def test_each_breach_is_a_line_and_the_sum_is_the_last() -> None:
    wrong = request(21.0, outcome=Outcome.WRONG)
    of = seen([request(1.0), wrong], [played("killed", 20.0, 24.0, 25.0)], [change(20.1, "degraded")])
    breach, last = sentences(judge(of, Timing()))
    assert breach == "BREACH: a request at 21.0 s: wrong"
    assert "SEED=7: 1 faults in 100 s (36/h), 2 requests, 2 hits, 0 failed, 1 wrong" in last


@pytest.mark.parametrize("kind", ORDERS)
def test_what_the_relay_is_told_is_never_nothing(kind: str) -> None:
    assert FAULTS[kind].of_the_connection
    for seed in range(20):
        order = ORDERS[kind](Random(seed))
        assert order.closed or order.to_server != CLEAN or order.to_client != CLEAN


def test_an_order_in_words_is_what_is_not_as_usual() -> None:
    assert in_words(Order()) == ""
    assert in_words(Order(to_client=Rules(stopped=True))) == "stopped to client"
    lossy = Rules(loss=0.123, delay_ms=(1, 50))
    assert in_words(Order(to_server=lossy, to_client=Rules(loss=0.123))) == (
        "delay_ms (1, 50) to server, loss 0.12 to server and to client"
    )


def test_the_tables_for_the_docs_have_a_line_for_each_kind_and_each_process() -> None:
    of = seen(
        [request(1.0), request(21.0, 0.5)], [played("killed", 20.0, 24.0, 25.0)],
        [change(20.1, "degraded"), change(24.6, "healthy")], [sample(9.0), sample(90.0, files=41)],
    )  # fmt: skip
    kinds, processes = tables(judge(of, Timing())).split("\n\n")
    assert kinds.splitlines()[2] == (
        "| killed | 1 | 1 | 0, 0, 0 | 300 / 300 / 300 | 0.1 / 0.1 | 0.6 / 0.6 | 1.0 / 1.0 |"
    )
    assert processes.splitlines()[2] == (
        "| EngineCore | 40 / 41 / 41 | 9 / 9 / 9 | 3 / 3 / 3 | 500.0 / 500.0 / 500.0 |  |"
    )
