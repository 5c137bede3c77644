"""The thread around `Health`: owns its link, asks the clock, runs the actions.

Threading: `begin`, `step` and `end` run in the heartbeat thread alone; all other public methods may be called
from any.  The link is made in the thread that uses it.  A registration waits for the server's answer, so it
runs in a thread of its own while the pings go on; there is one at a time, even if one is given up.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from cache_server.protocol import messages as m
from lmconnector import cores
from lmconnector.errors import RegistrationError
from lmconnector.health import Change, Health, Ping, Pong, State
from lmconnector.link import Connected, Disconnected, Event, Garbage, Link
from lmconnector.pace import RoundTrip
from lmconnector.timing import Timing

log = logging.getLogger(f"vllm.{__name__}")

CHANGES_MAX = 256
REASONS_TOLD_MAX = 8  # of one outage


@dataclass(frozen=True, slots=True)
class Membership:
    """What the server gave us for our registration."""

    session: int
    boot: int


def monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def run_in_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="lmconnector-register", daemon=True).start()


class Heartbeat:
    def __init__(
        self,
        new_link: Callable[[], Link],
        register: Callable[[], Membership],
        timing: Timing,
        clock: Callable[[], int] = monotonic_ms,
        run: Callable[[Callable[[], None]], None] = run_in_thread,
    ) -> None:
        """`register` runs off the heartbeat's thread, takes its time, and raises `RegistrationError`."""
        self.health = Health(timing, self._on_change)
        self.membership: Membership | None = None  # of the last successful registration
        self.strange_replies = 0
        self.round_trip = RoundTrip()  # of the pings
        self.changes: deque[Change] = deque(maxlen=CHANGES_MAX)  # for one reader, who takes them out
        self._new_link = new_link
        self._register = register
        self._clock = clock
        self._run = run
        self._link: Link | None = None
        self._last_ping = (0, 0)  # (seq, sent at ns)
        self._told: set[str] = set()  # reasons of the present outage
        self._attempts = 0  # to end it
        self._inbox: deque[Callable[[int], None]] = deque()  # what other threads have to say, given the time
        self._doubts: deque[None] = deque()  # of those who waited in vain, until the heartbeat has taken note
        self._stopping = False
        self._start_lock = threading.Lock()
        self._thread: threading.Thread | None = None

    @property
    def usable(self) -> bool:
        return not self._doubts and self.health.usable  # in this order: a doubt goes when the state has it

    def ensure_started(self) -> None:
        with self._start_lock:
            if self._thread is None and not self._stopping:
                self._thread = threading.Thread(target=self._loop, name="lmconnector-heartbeat", daemon=True)
                self._thread.start()

    def stop(self, timeout_ms: int) -> None:
        """For good: a stopped heartbeat never beats again."""
        with self._start_lock:
            self._stopping = True
            thread = self._thread
        self._wake()
        if thread is not None:
            thread.join(timeout_ms / 1_000)

    def disappointed(self) -> None:
        """An operation ran into its deadline: no other is to do so before the server has answered."""
        self._doubts.append(None)
        self._say(self._take_disappointment)

    def forgotten(self, session: int = 0) -> None:
        """An operation was refused because the server does not know the session it was sent with; 0: any."""
        self._say(partial(self._take_forgotten, session))

    def succeeded(self) -> None:
        """An operation was answered in time."""
        if self.health.success_is_news(self._clock()):
            self._say(self.health.on_success)

    def begin(self) -> None:
        self._link = self._new_link()
        self.health.start(self._clock())
        self._act()

    def step(self) -> None:
        """One turn: wait, listen, decide, act.  Silence is judged as of `now_ms`, after all that had come by
        then was heard: our own process may stall at any point."""
        assert self._link is not None, "begin first"
        events = self._link.poll(max(0, self.health.wake_at_ms - self._clock()))
        now_ms = self._clock()
        for event in (*events, *self._link.poll(0)):
            self._on_event(event, now_ms)
        for _ in range(len(self._inbox)):
            self._inbox.popleft()(now_ms)
        self.health.on_tick(now_ms)
        self._act()

    def end(self) -> None:
        """Also after a bug: without a heartbeat no cache, and the engine goes on."""
        self.health.stop("shutdown" if self._stopping else "a bug, see the stack trace", self._clock())
        if self._link is not None:
            self._link.close()

    def _loop(self) -> None:
        cores.spread()
        try:
            self.begin()
            while not self._stopping:
                self.step()
        finally:
            self.end()

    def _on_event(self, event: Event, now_ms: int) -> None:
        match event:
            case m.Pong():
                if event.seq == self._last_ping[0]:
                    took_us = (time.perf_counter_ns() - self._last_ping[1]) // 1_000
                    self.round_trip = self.round_trip.then(took_us)
                self.health.on_pong(Pong(event.seq, event.boot, event.known, event.state == "ready"), now_ms)
            case Connected():
                self.health.on_connected(now_ms)
            case Disconnected():
                self.health.on_disconnected(now_ms)
            case Garbage() | m.Reply():
                self.strange_replies += 1  # no pong: whatever it is, it proves nothing

    def _act(self) -> None:
        for action in self.health.take_actions():
            if isinstance(action, Ping):
                session = self.membership.session if self.membership else 0
                assert self._link is not None
                self._last_ping = (action.seq, time.perf_counter_ns())
                self._link.send(m.Ping(id=action.seq, seq=action.seq, session=session))
                self.health.on_sent(action.seq, self._clock())
            else:
                self._run(partial(self._run_registration, action.attempt))

    def _run_registration(self, attempt: int) -> None:
        membership, why_not = None, "a bug, see the stack trace"
        try:
            membership, why_not = self._register(), ""
        except RegistrationError as error:
            why_not = str(error)
        finally:
            self._say(partial(self._take_registration, attempt, membership, why_not))

    def _take_registration(
        self, attempt: int, membership: Membership | None, why_not: str, now_ms: int
    ) -> None:
        if membership is not None:
            self.membership = membership
        boot = membership.boot if membership is not None else 0
        self.health.on_recovered(attempt, boot, why_not, now_ms)

    def _take_forgotten(self, session: int, now_ms: int) -> None:
        if not session or (self.membership is not None and session == self.membership.session):
            self.health.on_forgotten(now_ms)  # else it was an answer to who we were before

    def _take_disappointment(self, now_ms: int) -> None:
        self.health.on_disappointment(now_ms)
        self._doubts.popleft()  # the state has the gate shut now, if it was open

    def _say(self, what: Callable[[int], None]) -> None:
        self._inbox.append(what)
        self._wake()

    def _wake(self) -> None:
        if self._link is not None:
            self._link.wake()

    def _on_change(self, change: Change) -> None:
        self.changes.append(change)
        level = self._level_of(change)
        outage = f" unusable_ms={change.unusable_ms}" if change.unusable_ms else ""
        log.log(
            level, 'health: %s -> %s why="%s" lasted_ms=%d%s',
            change.old.value, change.new.value, change.why, change.lasted_ms, outage,
        )  # fmt: skip

    def _level_of(self, change: Change) -> int:
        """An outage is told once: not each attempt that fails again for a reason that was told before."""
        if change.new is State.DEGRADED:
            if change.why in self._told or len(self._told) == REASONS_TOLD_MAX:
                return logging.DEBUG
            self._told.add(change.why)
            return logging.WARNING
        if change.new is State.HEALTHY:
            self._told.clear()
            self._attempts = 0
        elif change.old is State.DEGRADED:
            self._attempts += 1
        return logging.DEBUG if self._attempts > 1 and change.new is State.RECOVERING else logging.INFO
