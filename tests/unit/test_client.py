"""Requests and their replies: what lies there unread is not late, and nobody is blamed for another."""

from collections import deque

import pytest

from cache_server.protocol import messages as m
from lmconnector.client import Client
from lmconnector.gate import note_failure
from lmconnector.link import EVENTS_MAX, Event

DEADLINE_MS = 100


class Answering:
    """A server that answers at once, over a link that hands out so many events at a time."""

    def __init__(self) -> None:
        self.unread: deque[Event] = deque()

    def send(self, request: m.Request) -> bool:
        self.unread.append(m.Done(id=request.id, boot=7))
        return True

    def poll(self, timeout_ms: int) -> list[Event]:
        return [self.unread.popleft() for _ in range(min(EVENTS_MAX, len(self.unread)))]


def test_a_reply_that_waits_to_be_read_is_not_late() -> None:
    now_ms = 1_000
    client = Client(Answering(), lambda: now_ms)
    replies: list[m.Reply | None] = []
    for _ in range(2 * EVENTS_MAX + 1):
        client.send(m.Ping(id=client.next_id()), DEADLINE_MS, replies.append)
    now_ms += 2 * DEADLINE_MS  # a long step
    for _ in range(3):
        client.poll(0)
    assert len(replies) == 2 * EVENTS_MAX + 1
    assert None not in replies


def test_a_flood_of_what_nobody_waits_for_keeps_nothing_from_being_late() -> None:
    now_ms = 1_000
    link = Answering()
    client = Client(link, lambda: now_ms)
    replies: list[m.Reply | None] = []
    client.send(m.Ping(id=client.next_id()), DEADLINE_MS, replies.append)
    link.unread.clear()
    link.unread.extend(m.Done(id=10**6 + number, boot=7) for number in range(10 * EVENTS_MAX))
    now_ms += DEADLINE_MS
    client.poll(0)
    assert replies == [None]


class Gate:
    session = 70

    def __init__(self) -> None:
        self.heard: list[str] = []

    def disappointed(self) -> None:
        self.heard.append("disappointed")


@pytest.mark.parametrize(("session", "heard"), [(70, ["disappointed"]), (69, [])])
def test_a_server_is_not_blamed_for_what_its_predecessor_was_asked(session: int, heard: list[str]) -> None:
    gate = Gate()
    assert note_failure(gate, m.Clear(id=1, session=session), None) == "clear_late"
    assert gate.heard == heard
