"""The heartbeat's thread: started once, stopped for good, gone without a trace; its gate shut by any bug."""

import asyncio
import contextlib
import gc
import logging
import os
import threading
from collections.abc import Callable, Iterator
from functools import partial
from queue import Empty, SimpleQueue

import pytest

from cache_server.protocol import messages as m
from lmconnector import heartbeat
from lmconnector.errors import RegistrationError
from lmconnector.health import Change, State, Timing
from lmconnector.heartbeat import REASONS_TOLD_MAX, Heartbeat, Membership
from lmconnector.link import Connected, Disconnected, Event, Garbage, ZmqLink
from processes import eventually, short_dir
from threads import hasty, race

BOOT = 7
SESSION = 70
TIMING = Timing(interval_ms=40, timeout_ms=30, recover_timeout_ms=1_000, hold_ms_max=100)
SLEEPY = Timing(interval_ms=3_600_000)
JOIN_MS = 10_000
STARTERS = 64
CYCLES = 100


class FakeLink:
    """A server that answers at once, as long as it is told to."""

    def __init__(self) -> None:
        self.events: SimpleQueue[Event | None] = SimpleQueue()
        self.pings: list[m.Ping] = []
        self.wakes = 0
        self.answers = True
        self.known = True
        self.closed_by: threading.Thread | None = None

    def send(self, request: m.Request) -> bool:
        assert isinstance(request, m.Ping)
        self.pings.append(request)
        if self.answers:
            self.events.put(
                m.Pong(
                    id=request.id,
                    boot=BOOT,
                    seq=request.seq,
                    known=self.known,
                    state="ready",
                    progress=0,
                    silence_ms=0,
                )
            )
        return self.answers

    def poll(self, timeout_ms: int) -> list[Event]:
        try:
            event = self.events.get(timeout=timeout_ms / 1_000) if timeout_ms else self.events.get_nowait()
        except Empty:
            return []
        return [] if event is None else [event]

    def wake(self) -> None:
        self.wakes += 1
        self.events.put(None)

    def close(self) -> None:
        self.closed_by = threading.current_thread()


def register() -> Membership:
    return Membership(SESSION, BOOT)


class Rig:
    """A heartbeat over a fake link."""

    def __init__(self, timing: Timing = TIMING, register: Callable[[], Membership] = register) -> None:
        self.link = FakeLink()
        self.heart = Heartbeat(lambda: self.link, register, timing)

    def started(self) -> "Rig":
        self.heart.ensure_started()
        eventually(lambda: self.heart.usable, "usable")
        return self

    def is_in(self, state: State) -> bool:
        return self.heart.health.state is state


@contextlib.contextmanager
def rig_of(timing: Timing = TIMING, register: Callable[[], Membership] = register) -> Iterator[Rig]:
    rig = Rig(timing, register)
    try:
        yield rig
    finally:
        rig.heart.stop(JOIN_MS)


def heartbeat_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("lmconnector-")]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    eventually(lambda: heartbeat_threads() == [], "no thread is left")


@pytest.fixture
def uncaught(monkeypatch: pytest.MonkeyPatch) -> list[type[BaseException]]:
    """What ended a thread."""
    types: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda hook: types.append(hook.exc_type))
    return types


@pytest.fixture(params=[False, True], ids=["calm", "hasty"])
def _switching(request: pytest.FixtureRequest) -> Iterator[None]:
    with hasty() if request.param else contextlib.nullcontext():
        yield


class Log(logging.Handler):
    """What the heartbeat logs, however the engine has set up logging."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def log() -> Iterator[Log]:
    handler, level = Log(), heartbeat.log.level
    heartbeat.log.setLevel(logging.INFO)
    heartbeat.log.addHandler(handler)
    yield handler
    heartbeat.log.removeHandler(handler)
    heartbeat.log.setLevel(level)


@pytest.mark.usefixtures("_switching")
def test_trap_12_many_racing_starts_are_one() -> None:
    links: list[FakeLink] = []
    heart = Heartbeat(lambda: links.append(FakeLink()) or links[-1], register, TIMING)
    race(STARTERS, lambda _: heart.ensure_started())
    assert [thread.name for thread in heartbeat_threads()].count("lmconnector-heartbeat") == 1
    eventually(lambda: heart.usable, "usable")
    heart.stop(JOIN_MS)
    assert len(links) == 1


@pytest.mark.usefixtures("_switching")
def test_starts_and_stops_that_race_leave_nothing() -> None:
    for _ in range(20):
        rig = Rig()
        start, stop = rig.heart.ensure_started, partial(rig.heart.stop, JOIN_MS)
        race(8, lambda number, start=start, stop=stop: stop() if number == 3 else start())
        assert not rig.heart.usable
        rig.heart.ensure_started()
        assert [thread for thread in heartbeat_threads() if thread.name == "lmconnector-heartbeat"] == []


def test_a_stopped_heartbeat_never_beats_again() -> None:
    with rig_of() as rig:
        rig.started()
        rig.heart.stop(JOIN_MS)
        assert rig.is_in(State.STOPPED)
        assert not rig.heart.usable
        pings = len(rig.link.pings)
        rig.heart.ensure_started()
        rig.heart.stop(JOIN_MS)
        assert heartbeat_threads() == []
        assert len(rig.link.pings) == pings
        for late in (rig.heart.disappointed, rig.heart.succeeded, rig.heart.forgotten):
            late()
        assert rig.is_in(State.STOPPED)


def test_trap_13_a_start_after_a_stop_that_timed_out_is_no_second_loop() -> None:
    held, let_go = threading.Event(), threading.Event()
    with rig_of() as rig:
        rig.started()
        poll = rig.link.poll

        def stuck(timeout_ms: int) -> list[Event]:
            held.set()
            assert let_go.wait(JOIN_MS / 1_000)
            return poll(0)

        rig.link.poll = stuck  # type: ignore[method-assign]
        assert held.wait(JOIN_MS / 1_000)
        rig.heart.stop(timeout_ms=20)
        loops = [thread for thread in heartbeat_threads() if thread.name == "lmconnector-heartbeat"]
        assert len(loops) == 1, "it has not come back in time"
        rig.heart.ensure_started()
        assert [thread for thread in heartbeat_threads() if thread.name == "lmconnector-heartbeat"] == loops
        pings = len(rig.link.pings)
        let_go.set()
        eventually(lambda: rig.is_in(State.STOPPED), "stopped")
        assert len(rig.link.pings) <= pings + 1, "of the turn that it was in"


def test_a_stop_before_the_start_is_for_good_too() -> None:
    with rig_of() as rig:
        rig.heart.stop(JOIN_MS)
        rig.heart.ensure_started()
        assert heartbeat_threads() == []
        assert not rig.heart.usable
        assert rig.link.pings == []


def test_nothing_happens_before_the_start() -> None:
    with rig_of() as rig:
        assert not rig.heart.usable
        rig.heart.disappointed()
        assert rig.is_in(State.DORMANT)
        rig.started()


def test_a_stop_does_not_wait_for_the_next_ping() -> None:
    with rig_of(SLEEPY) as rig:
        rig.started()
        rig.heart.stop(JOIN_MS)
        assert rig.is_in(State.STOPPED)
        assert rig.link.closed_by is not None
        assert rig.link.closed_by.name == "lmconnector-heartbeat", "a link belongs to the thread that made it"


def test_trap_27_threads_and_files_are_gone_after_each_of_many_lives() -> None:
    with short_dir() as runtime_dir:

        def live() -> None:
            heart = Heartbeat(lambda: ZmqLink(runtime_dir), register, TIMING)
            heart.ensure_started()
            eventually(lambda: heart.membership, "registered")
            heart.stop(JOIN_MS)
            assert heart.health.state is State.STOPPED

        def count() -> tuple[int, int]:
            return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

        def nothing_more() -> bool:
            return all(now <= then for now, then in zip(count(), before, strict=True))

        before = count()
        gc.disable()  # what is let go is let go by `stop`, not when a cycle is found
        try:
            for _ in range(CYCLES):
                live()
                eventually(nothing_more, "nothing is left")
        finally:
            gc.enable()


class BrokenError(Exception):
    pass


def test_a_bug_in_the_loop_shuts_the_gate(uncaught: list[type[BaseException]], log: Log) -> None:
    with rig_of() as rig:
        rig.started()

        def poll(timeout_ms: int) -> list[Event]:
            raise BrokenError

        rig.link.poll = poll  # type: ignore[method-assign]
        eventually(lambda: rig.is_in(State.STOPPED), "stopped")
        eventually(lambda: rig.link.closed_by, "closed")
        assert not rig.heart.usable
        assert uncaught == [BrokenError]
        assert 'health: healthy -> stopped why="a bug, see the stack trace"' in log.lines[-1]


def test_a_link_that_cannot_be_made_leaves_the_gate_shut(uncaught: list[type[BaseException]]) -> None:
    def new_link() -> FakeLink:
        raise OSError("too many open files")

    heart = Heartbeat(new_link, register, TIMING)
    heart.ensure_started()
    eventually(lambda: heart.health.state is State.STOPPED, "stopped")
    assert not heart.usable
    heart.stop(JOIN_MS)
    assert uncaught == [OSError]


@pytest.mark.parametrize("bug", [BrokenError, AssertionError, asyncio.CancelledError, SystemExit])
def test_trap_03_a_bug_in_the_registration_does_not_end_the_heartbeat(
    bug: type[BaseException], uncaught: list[type[BaseException]]
) -> None:
    outcomes = [bug, bug, None]

    def register_at_last() -> Membership:
        if outcome := outcomes.pop(0):
            raise outcome
        return register()

    with rig_of(register=register_at_last) as rig:
        rig.started()
        assert outcomes == []
        assert uncaught == [bug] * 2


def test_trap_10_pings_go_on_while_a_registration_takes_its_time() -> None:
    may_end = threading.Event()

    def register_slowly() -> Membership:
        assert may_end.wait(JOIN_MS / 1_000)
        return register()

    with rig_of(Timing(interval_ms=20, timeout_ms=20, recover_timeout_ms=60_000), register_slowly) as rig:
        rig.heart.ensure_started()
        eventually(lambda: len(rig.link.pings) >= 5, "pings")
        assert rig.is_in(State.RECOVERING)
        assert {ping.session for ping in rig.link.pings} == {0}
        may_end.set()
        eventually(lambda: rig.heart.usable, "usable")
        eventually(lambda: rig.link.pings[-1].session == SESSION, "a ping with the session")


def test_a_refused_registration_is_tried_again_and_logged_with_its_reason(log: Log) -> None:
    refusals = [RegistrationError("BUSY: full"), None]

    def register_at_last() -> Membership:
        if refusal := refusals.pop(0):
            raise refusal
        return register()

    with rig_of(register=register_at_last) as rig:
        rig.started()
    assert [line.split(" lasted_ms")[0] for line in log.lines] == [
        'INFO health: dormant -> recovering why="first use"',
        'WARNING health: recovering -> degraded why="BUSY: full"',
        'INFO health: degraded -> recovering why="the server answers"',
        'INFO health: recovering -> healthy why="registered"',
        'INFO health: healthy -> stopped why="shutdown"',
    ]
    assert ["unusable_ms=" in line for line in log.lines] == [False, False, False, True, False]


def test_attempts_that_fail_for_a_reason_told_before_are_not_told_again(log: Log) -> None:
    refusals = [RegistrationError(why) for why in ("VERSION: 2 only", *["BUSY: full"] * 3, "VERSION: 2 only")]

    def register_at_last() -> Membership:
        if refusals:
            raise refusals.pop(0)
        return register()

    with rig_of(register=register_at_last) as rig:
        rig.started()
    assert [line.split(" lasted_ms")[0] for line in log.lines] == [
        'INFO health: dormant -> recovering why="first use"',
        'WARNING health: recovering -> degraded why="VERSION: 2 only"',
        'INFO health: degraded -> recovering why="the server answers"',
        'WARNING health: recovering -> degraded why="BUSY: full"',
        'INFO health: recovering -> healthy why="registered"',
        'INFO health: healthy -> stopped why="shutdown"',
    ]


def test_reasons_that_are_new_each_time_do_not_fill_the_log(log: Log) -> None:
    heart = Rig().heart
    for number in range(10 * REASONS_TOLD_MAX):
        heart._on_change(Change(State.RECOVERING, State.DEGRADED, f"strange bytes {number}", 5, 0))
    assert len(log.lines) == REASONS_TOLD_MAX
    heart._on_change(Change(State.RECOVERING, State.HEALTHY, "registered", 5, 5))
    heart._on_change(Change(State.HEALTHY, State.DEGRADED, "strange bytes 0", 5, 0))
    assert "-> degraded" in log.lines[-1], "another outage"


def test_the_gate_is_shut_before_a_disappointed_thread_goes_on() -> None:
    with rig_of() as rig:
        rig.heart.begin()
        rig.heart.step()
        eventually(lambda: rig.heart.step() or rig.heart.usable, "usable")
        rig.heart.disappointed()
        assert not rig.heart.usable, "and the heartbeat had no turn yet"
        rig.link.answers = False
        rig.heart.step()
        assert not rig.heart.usable
        rig.link.answers = True
        eventually(lambda: rig.heart.step() or rig.heart.usable, "usable")
        rig.heart.end()


def test_a_disappointment_that_is_said_while_another_is_taken_is_not_lost() -> None:
    """It comes from another thread, between the state's change and the end of the first one's doubt."""
    with rig_of() as rig:
        rig.heart.begin()
        eventually(lambda: rig.heart.step() or rig.heart.usable, "usable")
        take, taken = rig.heart.health.on_disappointment, []

        def interrupted(now_ms: int) -> None:
            take(now_ms)
            if not taken:
                taken.append(now_ms)
                rig.heart.disappointed()

        rig.heart.health.on_disappointment = interrupted  # type: ignore[method-assign]
        rig.heart.disappointed()
        rig.heart.step()
        asked = len(rig.link.pings)
        for event in rig.link.poll(0):  # the answer to what was asked before the second one
            rig.heart._on_event(event, rig.heart._clock())
        assert not rig.heart.usable
        eventually(lambda: rig.heart.step() or rig.heart.usable, "usable")
        assert len(rig.link.pings) > asked, "after it was asked again"
        rig.heart.end()


def test_round_trips_are_measured() -> None:
    with rig_of() as rig:
        rig.started()
        eventually(lambda: rig.heart.round_trip.last_us, "an answer")
        trip = rig.heart.round_trip
        assert 0 < trip.mean_us <= trip.max_us < JOIN_MS * 1_000


def test_a_refusal_of_an_older_session_is_old_news() -> None:
    with rig_of() as rig:
        rig.started()
        attempts = rig.heart.health._attempt
        rig.heart.forgotten(SESSION - 1)
        rig.heart.forgotten(SESSION - 2)
        pings = len(rig.link.pings)
        eventually(lambda: len(rig.link.pings) > pings + 1, "pings")
        assert rig.heart.health._attempt == attempts
        rig.heart.forgotten(SESSION)
        eventually(lambda: rig.heart.health._attempt == attempts + 1, "registers")
        eventually(lambda: rig.heart.usable, "usable")
        rig.heart.forgotten()
        eventually(lambda: rig.heart.health._attempt == attempts + 2, "registers")


def test_a_success_that_is_no_news_wakes_nobody() -> None:
    with rig_of(SLEEPY) as rig:
        rig.started()
        wakes = rig.link.wakes
        for _ in range(1_000):
            rig.heart.succeeded()
        assert rig.link.wakes == wakes


def test_what_is_no_pong_proves_nothing() -> None:
    with rig_of(Timing(interval_ms=40, timeout_ms=30, fail_after=2)) as rig:
        rig.started()
        rig.link.answers = False
        for event in (m.Done(id=1, boot=BOOT), Garbage("noise"), m.Done(id=2, boot=BOOT)):
            rig.link.events.put(event)
        eventually(lambda: rig.is_in(State.DEGRADED), "degraded")
        assert rig.heart.strange_replies == 3


def test_a_closed_connection_shuts_the_gate_and_a_new_one_is_asked_soon() -> None:
    with rig_of(SLEEPY) as rig:
        rig.started()
        rig.link.events.put(Disconnected())
        eventually(lambda: not rig.heart.usable, "shut")
        rig.link.events.put(Connected())
        eventually(lambda: rig.heart.usable, "usable long before the next ping would be due")


def test_one_turn_takes_what_was_said_before_it_and_no_more() -> None:
    with rig_of(SLEEPY) as rig:
        rig.heart.begin()
        turns: list[int] = []

        def say_again(now_ms: int) -> None:
            turns.append(now_ms)
            rig.heart._say(say_again)

        rig.heart._say(say_again)
        rig.heart.step()
        rig.heart.step()
        assert len(turns) == 2
        rig.heart.end()
