"""Is the cache server usable?  A pure state machine: no clock, socket or thread.

Rule 1: every decision about health is made in this file.
Rule 2: only the heartbeat thread calls its methods; any thread may read `usable`.
Rule 3: what counts is unanswered pings, not silent seconds: while our own process stalls, nobody is asked,
and nobody is blamed.

A hung server is found within `Timing.hang_found_within_ms`; a dead one at once, by the closed connection; a
restarted one by the boot id in the next pong, even if no ping was missed.

What goes wrong again and again with the same server costs less and less: each time that trust is lost, the
gate stays shut for twice as long (`_hold`).  An operation's success ends that, once the gate has stayed open
for as long as it would next be shut; and so does a new server.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from lmconnector.timing import JITTER_PERCENT, Timing


class State(Enum):
    DORMANT = "dormant"  # nobody has needed us yet
    HEALTHY = "healthy"
    SUSPECT = "suspect"  # somebody waited in vain: no use before the server has answered
    DEGRADED = "degraded"  # every cache operation is a miss
    RECOVERING = "recovering"  # it answers, but must learn our KV caches (again)
    STOPPED = "stopped"


TRANSITIONS: dict[State, frozenset[State]] = {
    State.DORMANT: frozenset({State.RECOVERING, State.STOPPED}),
    State.HEALTHY: frozenset({State.SUSPECT, State.DEGRADED, State.RECOVERING, State.STOPPED}),
    State.SUSPECT: frozenset({State.HEALTHY, State.DEGRADED, State.RECOVERING, State.STOPPED}),
    State.DEGRADED: frozenset({State.RECOVERING, State.STOPPED}),
    State.RECOVERING: frozenset({State.HEALTHY, State.DEGRADED, State.STOPPED}),
    State.STOPPED: frozenset(),
}


@dataclass(frozen=True, slots=True)
class Ping:
    """Send it, then call `on_sent`."""

    seq: int


@dataclass(frozen=True, slots=True)
class Recover:
    """Register our KV caches, then call `on_recovered` with this attempt."""

    attempt: int


@dataclass(frozen=True, slots=True)
class Pong:
    seq: int
    boot: int
    known: bool  # false: the server restarted or has taken us for dead
    ready: bool  # false: it is about to stop


@dataclass(frozen=True, slots=True)
class Change:
    old: State
    new: State
    why: str
    lasted_ms: int  # the old state
    unusable_ms: int  # the whole outage, when it ends


class Health:
    def __init__(self, timing: Timing, on_change: Callable[[Change], None]) -> None:
        self._timing = timing
        self._on_change = on_change
        self._state = State.DORMANT
        self._since_ms = 0
        self._unusable_since_ms = 0
        self._seq = 0
        self._doubted_seq = 0  # pongs up to this one are older than the last disappointment
        self._unanswered: list[tuple[int, int]] = []  # (seq, sent at ms), at most `fail_after`
        self._sent_ms = 0
        self._ping_at_ms = 0
        self._boot = 0  # of the server that we last wanted to know us
        self._attempt = 0
        self._registering = False  # perhaps still for an attempt that was given up
        self._recover_until_ms = 0
        self._hold_ms = 0  # the next one
        self._hold_until_ms = 0  # until then nothing that this server says opens the gate
        self._actions: list[Ping | Recover] = []
        self.late_pongs = 0

    @property
    def state(self) -> State:
        return self._state

    @property
    def usable(self) -> bool:
        return self._state is State.HEALTHY

    @property
    def wake_at_ms(self) -> int:
        waits = [self._ping_at_ms]
        if self._state is State.RECOVERING:
            waits.append(self._recover_until_ms)
        elif self._unanswered and self._state is not State.DEGRADED:
            decisive = 0 if self._state is State.HEALTHY else -1  # suspicious already: ask the next in time
            waits.append(self._unanswered[decisive][1] + self._timing.timeout_ms)
        return min(waits)

    def take_actions(self) -> list[Ping | Recover]:
        actions, self._actions = self._actions, []
        return actions

    def start(self, now_ms: int) -> None:
        self._since_ms = self._unusable_since_ms = now_ms
        self._recover("first use", 0, now_ms)
        self._ping_at_ms = now_ms + self._timing.interval_ms

    def stop(self, why: str, now_ms: int) -> None:
        if self._state is not State.STOPPED:
            self._become(State.STOPPED, why, now_ms)
        self._actions.clear()

    def on_tick(self, now_ms: int) -> None:
        if self._state in (State.DORMANT, State.STOPPED):
            return
        timeout_ms = self._timing.timeout_ms
        if self._state is State.RECOVERING and now_ms >= self._recover_until_ms:
            self._fail("no answer to the registration", now_ms)
        lost = sum(now_ms - sent_ms >= timeout_ms for _, sent_ms in self._unanswered)
        if lost and self._state is State.HEALTHY:
            self._suspect(f"ping unanswered for {timeout_ms} ms", now_ms)
        if lost and self._state is State.SUSPECT:
            self._ping_at_ms = min(self._ping_at_ms, self._unanswered[-1][1] + timeout_ms)
        if lost >= self._timing.fail_after and self._state in (State.SUSPECT, State.RECOVERING):
            self._fail(f"{lost} pings unanswered", now_ms)
        if now_ms >= self._ping_at_ms:
            self._ping(now_ms)

    def on_sent(self, seq: int, now_ms: int) -> None:
        """The ping has left.  Not earlier: while our own process stalls before that, nobody was asked."""
        self._sent_ms = now_ms
        self._unanswered = [*self._unanswered, (seq, now_ms)][-self._timing.fail_after :]

    def on_pong(self, pong: Pong, now_ms: int) -> None:
        if self._state in (State.DORMANT, State.STOPPED):
            return
        sent_ms = dict(self._unanswered).get(pong.seq)
        if sent_ms is None:
            self.late_pongs += 1
            return
        self._unanswered = [(seq, at_ms) for seq, at_ms in self._unanswered if seq > pong.seq]
        prompt = now_ms - sent_ms <= self._timing.timeout_ms  # else it lives, and is too slow to be used
        if not pong.ready:
            if self._state is not State.DEGRADED:
                self._fail("the server is starting or about to stop", now_ms)
        elif self._state is State.DEGRADED:
            held = pong.boot == self._boot and now_ms < self._hold_until_ms
            if prompt and not held and not self._registering:
                self._recover("the server answers", pong.boot, now_ms)
        elif self._state is not State.RECOVERING:
            self._judge(pong, prompt, now_ms)

    def _judge(self, pong: Pong, prompt: bool, now_ms: int) -> None:
        if pong.boot != self._boot:
            self._recover("the server was restarted", pong.boot, now_ms)
        elif not pong.known:
            self.on_forgotten(now_ms)
        elif self._state is State.SUSPECT and prompt and now_ms >= self._hold_until_ms:
            if pong.seq > self._doubted_seq:
                self._become(State.HEALTHY, "the server answers", now_ms)
            else:
                self._ask_soon(now_ms)

    def on_disappointment(self, now_ms: int) -> None:
        """A cache operation ran into its deadline: ask the server at once; only that answer counts.  It may
        answer pings and nothing else: hence the hold."""
        self._doubted_seq = self._seq
        if self._state is State.HEALTHY:
            self._suspect("an operation ran into its deadline", now_ms)
            self._ping_at_ms = min(self._ping_at_ms, now_ms)

    def on_success(self, now_ms: int) -> None:
        """A cache operation was answered in time."""
        if self.success_is_news(now_ms):
            self._hold_ms = 0

    def success_is_news(self, now_ms: int) -> bool:
        return 0 < self._hold_ms <= now_ms - self._since_ms and self._state is State.HEALTHY

    def on_forgotten(self, now_ms: int) -> None:
        """The server does not know us: so says a pong, or its refusal of an operation."""
        if self._state in (State.HEALTHY, State.SUSPECT):
            self._hold(now_ms)
            if now_ms < self._hold_until_ms:
                self._degrade("the server forgot us again", now_ms)
            else:
                self._recover("the server forgot us", self._boot, now_ms)

    def on_connected(self, now_ms: int) -> None:
        """Ask soon: it may be a new server.  Not at once: connections may come and go without end."""
        if self._state not in (State.DORMANT, State.STOPPED):
            self._ask_soon(now_ms)

    def on_disconnected(self, now_ms: int) -> None:
        if self._state in (State.HEALTHY, State.SUSPECT, State.RECOVERING):
            self._fail("connection closed", now_ms)

    def on_recovered(self, attempt: int, boot: int, why_not: str, now_ms: int) -> None:
        """`why_not` is empty when the server knows our KV caches now.  Each attempt is answered once."""
        assert self._registering
        assert attempt == self._attempt, "one at a time"
        self._registering = False
        if self._state is not State.RECOVERING:
            return  # it was given up
        if why_not:
            self._fail(why_not, now_ms)
            return
        self._boot = boot
        self._unanswered.clear()  # those asked about the old registration
        self._ping_at_ms = min(self._ping_at_ms, now_ms)  # this answer may be old
        self._become(State.HEALTHY, "registered", now_ms)

    def _recover(self, why: str, boot: int, now_ms: int) -> None:
        if boot != self._boot:
            self._boot = boot
            self._hold_ms = self._hold_until_ms = 0
        self._attempt += 1
        self._registering = True
        self._recover_until_ms = now_ms + self._timing.recover_timeout_ms
        self._become(State.RECOVERING, why, now_ms)
        self._actions.append(Recover(self._attempt))

    def _suspect(self, why: str, now_ms: int) -> None:
        self._hold(now_ms)
        self._become(State.SUSPECT, why, now_ms)

    def _fail(self, why: str, now_ms: int) -> None:
        self._hold(now_ms)
        self._degrade(why, now_ms)

    def _degrade(self, why: str, now_ms: int) -> None:
        self._unanswered.clear()
        self._ping_at_ms = max(self._ping_at_ms, now_ms + self._timing.interval_ms)
        self._become(State.DEGRADED, why, now_ms)

    def _hold(self, now_ms: int) -> None:
        """Trust is lost; the first time, or after the gate has long been open, it costs nothing."""
        if self._state is State.SUSPECT:
            return  # it was lost before
        hold_ms_max = self._timing.hold_ms_max
        if self._state is State.HEALTHY and now_ms - self._since_ms >= hold_ms_max:
            self._hold_ms = 0
        self._hold_until_ms = now_ms + self._hold_ms
        self._hold_ms = min(2 * self._hold_ms or self._timing.interval_ms, hold_ms_max)

    def _ask_soon(self, now_ms: int) -> None:
        pause_ms = min(self._timing.interval_ms // 4, self._timing.timeout_ms)
        self._ping_at_ms = min(self._ping_at_ms, max(now_ms, self._sent_ms + pause_ms))

    def _ping(self, now_ms: int) -> None:
        self._seq += 1
        self._actions.append(Ping(self._seq))
        percent = 100 - JITTER_PERCENT + now_ms % (2 * JITTER_PERCENT + 1)
        gap_ms = self._timing.interval_ms * percent // 100
        self._ping_at_ms = now_ms + max(gap_ms, self._timing.timeout_ms)  # each is judged before the next

    def _become(self, state: State, why: str, now_ms: int) -> None:
        assert state in TRANSITIONS[self._state], (self._state, state)
        old, self._state = self._state, state
        if old is State.HEALTHY:
            self._unusable_since_ms = now_ms
        unusable_ms = now_ms - self._unusable_since_ms if state is State.HEALTHY else 0
        change = Change(old, state, why, now_ms - self._since_ms, unusable_ms)
        self._since_ms = now_ms
        self._on_change(change)
