"""A stop is counted whenever it comes, and obeyed at once where nothing is lost by that."""

import signal
from collections.abc import Iterator

import pytest

from cache_server.orders import Orders, StoppedEarlyError


@pytest.fixture
def orders() -> Iterator[Orders]:
    """A real signal's, of one that nobody else uses."""
    orders = Orders()
    before = signal.signal(signal.SIGUSR1, lambda _signal, _frame: orders.stop())
    yield orders
    signal.signal(signal.SIGUSR1, before)


def stop() -> None:
    signal.raise_signal(signal.SIGUSR1)


def test_stops_are_counted(orders: Orders) -> None:
    for count in (1, 2):
        stop()
        assert orders.stops == count


def test_a_stop_ends_what_may_be_broken_off(orders: Orders) -> None:
    reached = []

    def work() -> None:
        with orders.obeyed_at_once():
            reached.append("begun")
            stop()
            reached.append("gone on")

    with pytest.raises(StoppedEarlyError):
        work()
    assert (reached, orders.stops) == (["begun"], 1)


def test_a_stop_that_came_before_is_not_forgotten(orders: Orders) -> None:
    stop()
    with pytest.raises(StoppedEarlyError), orders.obeyed_at_once():
        pytest.fail("it was begun")


def test_the_way_out_is_not_interrupted_once_more(orders: Orders) -> None:
    tidied = []

    def work() -> None:
        with orders.obeyed_at_once():
            try:
                stop()
            finally:
                stop()
                tidied.append(True)

    with pytest.raises(StoppedEarlyError):
        work()
    stop()
    assert (tidied, orders.stops) == ([True], 3)
