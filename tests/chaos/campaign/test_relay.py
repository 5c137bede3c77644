"""The relay between real sockets: what passes is what was sent, and each fault is done once."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from cache_server.client import Client, UnreachableError
from cache_server.protocol import messages as m
from cache_server.protocol.presence import SOCKET
from chaos.campaign.stage import RelayProcess
from chaos.campaign.wire import Order, Rules
from processes import ServerProcess, eventually, server, short_dir

pytestmark = pytest.mark.chaos

TIMEOUT_MS = 300
LARGE = 100_000


@contextmanager
def relayed() -> Iterator[tuple[RelayProcess, Path, ServerProcess]]:
    """-> with the dir before the relay, and the server behind it"""
    with server("--canary-idle", "off") as process, short_dir() as front:
        relay = RelayProcess(front, process.runtime_dir, seed=1)
        try:
            yield relay, front, process
        finally:
            relay.close()


def answered(client: Client) -> bool:
    try:
        client.ask(m.Ping(id=client.next_id()), m.Pong)
    except UnreachableError:
        return False
    return True


def served(process: ServerProcess) -> int:
    return process.status().counters["served"]


def test_without_an_order_bytes_pass_as_they_are() -> None:
    with (
        relayed() as (_, front, process),
        Client(front, 5_000) as before,
        Client(process.runtime_dir) as behind,
    ):
        for client in (before, behind):
            assert client.ask(m.Ping(id=4711), m.Pong).id == 4711
        many = m.Status(id=1, workers=True)
        assert before.ask(many, m.StatusReply).status.keys() == behind.ask(many, m.StatusReply).status.keys()


def test_large_messages_pass_both_ways() -> None:
    context = zmq.Context()
    with short_dir() as back, short_dir() as front:
        router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
        router.bind(f"ipc://{back / SOCKET}")
        relay = RelayProcess(front, back, seed=2)
        dealer.connect(f"ipc://{front / SOCKET}")
        for each in (router, dealer):
            each.setsockopt(zmq.RCVTIMEO, 5_000)
            each.setsockopt(zmq.LINGER, 0)
        sent = [bytes([number]) * (LARGE * number) for number in range(6)]
        for content in sent:
            dealer.send_multipart([content, content[:3]])
        for content in sent:
            name, *frames = router.recv_multipart()
            assert frames == [content, content[:3]]
            router.send_multipart([name, *frames])
        assert [dealer.recv_multipart()[0] for _ in sent] == sent
        relay.close()
        context.destroy(linger=0)


@pytest.mark.parametrize("way", ["to_server", "to_client"])
def test_what_is_lost_is_lost_on_its_way(way: str) -> None:
    with relayed() as (relay, front, process), Client(front, TIMEOUT_MS) as client:
        assert answered(client)
        before = served(process)
        relay.obey(Order(**{way: Rules(loss=1.0)}))
        assert not answered(client)
        assert served(process) - before == (2 if way == "to_client" else 1)  # the first STATUS, and the ping
        relay.obey(Order())
        assert answered(client)


def test_what_comes_twice_is_served_twice() -> None:
    with relayed() as (relay, front, process), Client(front, TIMEOUT_MS) as client:
        assert answered(client)
        before = served(process)
        relay.obey(Order(to_server=Rules(duplicate=1.0)))
        assert answered(client)
        eventually(lambda: served(process) - before >= 3, "both")


def test_garbage_is_refused_by_the_server() -> None:
    with relayed() as (relay, front, process), Client(front, TIMEOUT_MS) as client:
        assert answered(client)
        relay.obey(Order(to_server=Rules(garble=1.0)))
        assert not answered(client)
        eventually(lambda: process.status().refused.get(m.Code.MALFORMED), "a refusal")


def test_a_torn_frame_costs_the_connection_and_a_new_one_is_as_good() -> None:
    with relayed() as (relay, front, _), Client(front, TIMEOUT_MS) as client:
        assert answered(client)
        relay.obey(Order(to_server=Rules(tear=1.0)))
        assert not answered(client)
        relay.obey(Order())
        eventually(lambda: answered(client), "a new connection")


def test_a_delay_takes_its_time() -> None:
    with relayed() as (relay, front, _), Client(front, 5_000) as client:
        assert answered(client)
        relay.obey(Order(to_server=Rules(delay_ms=(200, 200)), to_client=Rules(delay_ms=(200, 200))))
        began_s = time.monotonic()
        assert answered(client)
        assert time.monotonic() - began_s >= 0.4


def test_a_trickle_takes_its_time() -> None:
    with relayed() as (relay, front, _), Client(front, 10_000) as client:
        assert answered(client)
        relay.obey(Order(to_client=Rules(bytes_per_ms=1)))
        began_s = time.monotonic()
        client.ask(m.Status(id=2), m.StatusReply)
        assert time.monotonic() - began_s >= 0.5


@pytest.mark.parametrize("lost", [False, True], ids=["late", "lost"])
def test_half_open_is_silence_and_then_all_at_once_or_an_end(lost: bool) -> None:
    with relayed() as (relay, front, process), Client(front, TIMEOUT_MS) as client:
        assert answered(client)
        before = served(process)
        relay.obey(Order(to_server=Rules(stopped=True)))
        assert not answered(client)
        assert served(process) - before == 1  # the first STATUS: the ping is parked
        relay.obey(Order(close_once=lost))
        if lost:
            eventually(lambda: answered(client), "a new connection")
        else:
            eventually(lambda: served(process) - before >= 4, "the parked ping")


def test_cut_is_closed_at_once_and_as_often_as_one_comes_back() -> None:
    with relayed() as (relay, front, _), Client(front, TIMEOUT_MS) as client:
        assert answered(client)
        relay.obey(Order(closed=True))
        assert not answered(client)
        relay.obey(Order())
        eventually(lambda: answered(client), "a new connection")


def test_a_dead_server_closes_the_connection_of_whoever_is_behind_the_relay() -> None:
    with relayed() as (_, front, process), Client(front, TIMEOUT_MS) as client:
        assert answered(client)
        process.kill()
        assert not answered(client)
        process.start()
        eventually(lambda: answered(client), "the new server")
