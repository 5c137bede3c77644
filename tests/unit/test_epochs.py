"""Old epochs are cleared for certain, however late; nobody else has the new ones."""

from collections import Counter
from itertools import count

import pytest

from cache_server.protocol import messages as m
from lmconnector import epochs
from lmconnector.client import Client
from lmconnector.epochs import Epochs
from lmconnector.gate import RETRY_MS
from lmconnector.link import Event

DEADLINE_MS = 100


class Gate:
    usable, session, arena = True, 70, b"arena"

    def disappointed(self) -> None: ...

    def forgotten(self, session: int) -> None: ...


class Link:
    answers = True

    def __init__(self) -> None:
        self.cleared: list[int] = []
        self._replies: list[Event] = []

    def send(self, request: m.Request) -> bool:
        assert isinstance(request, m.Clear)
        self.cleared.append(request.epoch)
        if self.answers:
            self._replies.append(m.Done(id=request.id, boot=7, count=1))
        return True

    def poll(self, timeout_ms: int) -> list[Event]:
        replies, self._replies = self._replies, []
        return replies


class World:
    def __init__(self) -> None:
        self.now_ms = 1_000
        self.gate, self.link, self.counts = Gate(), Link(), Counter[str]()
        self.client = Client(self.link, lambda: self.now_ms)
        self.epochs = Epochs(self.client, self.gate, self.counts, DEADLINE_MS, count(101).__next__)

    def pass_ms(self, ms: int) -> None:
        self.now_ms += ms
        self.client.poll(0)
        self.epochs.tell(self.now_ms)
        self.client.poll(0)


@pytest.fixture
def world() -> World:
    return World()


def test_a_reset_clears_the_epoch_that_is_over(world: World) -> None:
    assert world.epochs.begin_anew(world.now_ms)
    assert world.epochs.now == 101
    world.pass_ms(10 * RETRY_MS)
    assert world.link.cleared == [0]


def test_an_absent_server_is_told_when_it_is_back(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.gate.usable = False
    assert not world.epochs.begin_anew(world.now_ms)
    assert "can't be told now" in caplog.text
    world.pass_ms(RETRY_MS)
    assert world.link.cleared == []
    world.gate.usable = True
    world.pass_ms(RETRY_MS)
    world.pass_ms(RETRY_MS)
    assert world.link.cleared == [0]


def test_without_an_answer_it_is_told_again(world: World) -> None:
    world.link.answers = False
    world.epochs.begin_anew(world.now_ms)
    for _ in range(4):
        world.pass_ms(RETRY_MS // 2)
    assert world.counts["drops/clear_late"] == 2
    assert world.link.cleared == [0, 0, 0]


def test_of_many_resets_the_first_and_the_last_epoch_are_cleared(world: World) -> None:
    """The first is had again by an engine that starts anew; the others by nobody."""
    world.gate.usable = False
    for _ in range(100):
        world.epochs.begin_anew(world.now_ms)
    world.gate.usable = True
    for _ in range(4):
        world.pass_ms(RETRY_MS)
    assert world.link.cleared == [0, 199]


def test_no_two_engines_draw_the_same() -> None:
    drawn = {epochs.draw() for _ in range(1_000)}
    assert len(drawn) == 1_000
    assert epochs.FIRST not in drawn
