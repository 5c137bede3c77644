"""The stock of reserved slots: what the server thinks we hold and what we know of stay the same."""

import pytest

from cache_server.protocol import messages as m
from cache_server.protocol.keys import SLOT_REF, SlotRef, split_slot_names
from cache_server.protocol.messages import Code
from lmconnector.client import Client
from lmconnector.gate import RETRY_MS
from lmconnector.link import Event
from lmconnector.stock import Stock, log
from logs import told_by

DEADLINE_MS = 100


class OpenGate:
    usable, session, arena = True, 70, b"arena"


class Repeating:
    """A link over which each reservation arrives twice, and is granted twice."""

    def __init__(self) -> None:
        self.asked: list[m.Request] = []
        self._replies: list[Event] = []
        self._granted = 0

    def send(self, request: m.Request) -> bool:
        self.asked.append(request)
        if isinstance(request, m.Reserve):
            self._replies += [self._grant(request), self._grant(request)]
        if isinstance(request, m.Abort):
            self._replies.append(m.Done(id=request.id, boot=7, count=0))
        return True

    def poll(self, timeout_ms: int) -> list[Event]:
        replies, self._replies = self._replies, []
        return replies

    def _grant(self, request: m.Reserve) -> m.Reserved:
        first, self._granted = self._granted, self._granted + request.count
        slots = [SlotRef(4096 * number, number, number) for number in range(first, self._granted)]
        packed = b"".join(SLOT_REF.pack(*slot) for slot in slots)
        return m.Reserved(id=request.id, boot=7, slots=packed, slot_bytes=4096, part_offsets=(0,))


def test_slots_of_a_reservation_that_arrived_twice_go_back() -> None:
    link = Repeating()
    client = Client(link, lambda: 1_000)
    stock = Stock(client, OpenGate(), groups=1, target=4, deadline_ms=DEADLINE_MS)
    for _ in range(3):
        stock.refill(1_000)
        client.poll(0)
    reserve, abort = link.asked
    assert isinstance(reserve, m.Reserve)
    assert isinstance(abort, m.Abort)
    assert abort.all_but
    assert sorted(number for _, number in split_slot_names(abort.slots)) == [0, 1, 2, 3]


class Answering(Repeating):
    """Says the next of these words to each reservation, and grants those beyond."""

    def __init__(self, *codes: Code) -> None:
        super().__init__()
        self.codes = list(codes)

    def send(self, request: m.Request) -> bool:
        if not isinstance(request, m.Reserve) or not self.codes:
            return super().send(request)
        self.asked.append(request)
        self._replies.append(m.Refused(id=request.id, boot=7, code=self.codes.pop(0), detail="no room"))
        return True


def counts_asked(*codes: Code, step_ms: int, steps: int = 12) -> list[int]:
    """By an engine that uses up all that it is given."""
    link = Answering(*codes)
    client = Client(link, lambda: now_ms)
    stock = Stock(client, OpenGate(), groups=1, target=8, deadline_ms=DEADLINE_MS)
    for now_ms in range(1_000, 1_000 + steps * step_ms, step_ms):
        stock.refill(now_ms)
        client.poll(0)
        while stock.take(0):
            pass
    return [request.count for request in link.asked if isinstance(request, m.Reserve)]


def test_a_server_that_is_busy_is_asked_for_less_later_and_for_all_again_when_it_gives() -> None:
    assert counts_asked(Code.BUSY, step_ms=RETRY_MS // 4, steps=5) == [8, 4]
    assert counts_asked(*[Code.BUSY] * 5, step_ms=RETRY_MS)[:9] == [8, 4, 2, 1, 1, 1, 2, 4, 8]


def test_a_group_keeps_no_more_than_the_others_may_have() -> None:
    """The server is busy: what one has beyond that goes back, or another one would never get any."""
    link = Answering()
    client = Client(link, lambda: 1_000)
    stock = Stock(client, OpenGate(), groups=2, target=8, deadline_ms=DEADLINE_MS)
    stock.refill(1_000)
    link._replies[2:] = [m.Refused(id=link.asked[1].id, boot=7, code=Code.BUSY, detail="no room")]
    link._replies[1:2] = []  # nothing came twice
    client.poll(0)
    stock.refill(1_000 + RETRY_MS)
    told = link.asked[-1]
    assert isinstance(told, m.Abort)
    assert len(split_slot_names(told.slots)) == 4


def test_what_is_too_large_is_not_asked_for_again() -> None:
    assert counts_asked(*[Code.TOO_LARGE] * 2, step_ms=1)[:5] == [8, 4, 2, 2, 2]


def test_a_server_whose_slots_are_too_small_is_asked_once_a_second_and_told_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert counts_asked(*[Code.TOO_LARGE] * 99, step_ms=RETRY_MS // 4) == [8, 4, 2, 1, 1, 1]
    assert told_by(caplog, log) == ["store: the server gives no slots: TOO_LARGE: no room"]
