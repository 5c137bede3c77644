"""What must hold at every moment of the simulated world, whatever the faults."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmconnector.health import JITTER_PERCENT, TRANSITIONS, Change, State
from lmconnector.link import Disconnected, Event

if TYPE_CHECKING:
    from sim.world import World

STILL_TURNS_MAX = 20  # turns of the loop at one instant
PINGS_MAX = 6  # in one interval, beside those for each timeout, for each server that appears in it
OPENINGS_MAX = 3  # of the gate within `hold_ms_max`, beside one for each doubling
OPENINGS_PER_INTERVAL_MAX = 0.5  # in the long run, even if something good is heard now and then
NEVER_MS = 10**12


class Checkers:
    def __init__(self, world: "World") -> None:
        self.world = world
        self.stalling = False  # our process is, at this moment
        self.registrations = 0
        self._registering = False
        self._forgotten = True  # by the server, since it last registered us
        self.sent: list[tuple[int, int]] = []  # (seq, at ms)
        self._arrived: dict[int, int] = {}  # first pong: seq -> at ms
        self._good_awake_ms = self._pinged_awake_ms = self._heard_awake_ms = self.awake_ms
        self._opened_awake_ms = self._changed_awake_ms = self.awake_ms
        self._cut_off = False
        self._refused_session = self._said_refused = 0
        self._boots: list[int] = []
        self._openings: list[int] = []
        self._openings_of_the_same_server: list[int] = []
        self._turned_ms = self._still_turns = 0

    @property
    def awake_ms(self) -> int:
        """Time as our process knows it: stalls do not count."""
        return self.world.now_ms - self.world.stalled_ms

    @property
    def gap_ms_max(self) -> int:
        return self.world.timing.interval_ms * (100 + JITTER_PERCENT) // 100

    @property
    def registering(self) -> bool:
        return self._registering

    # What the world tells

    def on_time_passes(self, to_ms: int) -> None:
        assert to_ms >= self.world.now_ms
        if self.world.good:
            self._good_awake_ms = to_ms - self.world.stalled_ms

    def on_time_passed(self) -> None:
        if self.world.good:
            self._good_awake_ms = self.awake_ms
        if not self.stalling:
            self.check()

    def on_registration_begun(self) -> None:
        assert not self._registering, "two registrations at once"
        assert self.world.heart.health.state in (State.RECOVERING, State.DEGRADED)
        self._registering = True
        self.registrations += 1

    def on_registered(self) -> None:
        self._forgotten = False
        self._good_awake_ms = self.awake_ms

    def on_registration_ended(self) -> None:
        self._registering = False

    def on_forgotten(self) -> None:
        self._forgotten = True

    def on_boot(self) -> None:
        self._boots.append(self.world.now_ms)
        self._openings.clear()
        self._openings_of_the_same_server.clear()

    def on_success(self) -> None:
        self._openings.clear()

    def on_heard(self, events: Sequence[Event]) -> None:
        """What the heartbeat got from its link."""
        self._cut_off = self._cut_off or Disconnected() in events
        self._refused_session = self._said_refused or self._refused_session
        self._said_refused = 0

    def on_refusal(self, session: int) -> None:
        """Of an operation."""
        self._said_refused = session

    def on_arrival(self, seq: int) -> None:
        self._arrived.setdefault(seq, self.world.now_ms)
        self._heard_awake_ms = self.awake_ms

    def on_ping(self, seq: int) -> None:
        world = self.world
        assert world.heart.health.state not in (State.DORMANT, State.STOPPED)
        assert not self.sent or seq > self.sent[-1][0]
        self.sent.append((seq, world.now_ms))
        since_ms = world.now_ms - world.timing.interval_ms
        burst = [at_ms for _, at_ms in self.sent[-40:] if at_ms > since_ms]
        boots = [at_ms for at_ms in self._boots if at_ms > since_ms]
        pings_max = PINGS_MAX + world.timing.interval_ms // world.timing.timeout_ms
        assert len(burst) <= pings_max * (1 + len(boots)), f"ping storm: {burst}"
        self._pinged_awake_ms = self.awake_ms

    def on_change(self, change: Change) -> None:
        assert change.new in TRANSITIONS[change.old]
        self._changed_awake_ms = self.awake_ms
        assert change.lasted_ms >= 0
        assert change.unusable_ms >= 0
        judged_ms = self.world.heart.health._since_ms
        if "forgot us" in change.why:
            assert self._forgotten, "registers again although the server knows us"
        if change.why.startswith("ping unanswered"):
            assert self._unanswered(judged_ms), "suspicion although each ping was answered in time"
        if change.why.endswith("pings unanswered"):
            fail_after = self.world.timing.fail_after
            assert len(self._unanswered(judged_ms)) == fail_after, "false alarm: an answer was there"
        if change.new is State.HEALTHY:
            self._on_opening(change)

    def on_turn(self) -> None:
        """After each turn of the heartbeat's loop."""
        self.check()
        self._check_news()
        timing = self.world.timing
        silence_ms = self.awake_ms - self._pinged_awake_ms
        assert silence_ms <= self.gap_ms_max + timing.interval_ms, f"no ping for {silence_ms} ms"
        if self.world.heart.health.state in (State.HEALTHY, State.SUSPECT):
            unheard_ms = self.awake_ms - max(self._heard_awake_ms, self._opened_awake_ms)
            assert unheard_ms <= timing.hang_found_within_ms, f"a hang of {unheard_ms} ms was not found"
        if self.world.heart.health.state is State.RECOVERING:
            recovering_ms = self.awake_ms - self._changed_awake_ms
            assert recovering_ms <= timing.recover_timeout_ms, "waits for ever to be registered"
        self._still_turns = 0 if self.world.now_ms > self._turned_ms else self._still_turns + 1
        self._turned_ms = self.world.now_ms
        assert self._still_turns <= STILL_TURNS_MAX, "hot loop"

    def _check_news(self) -> None:
        heart = self.world.heart
        if self._cut_off:
            assert not heart.usable, "open although the connection was closed"
        if heart.membership is not None and heart.membership.session == self._refused_session:
            assert not heart.usable, "open although an operation's refusal says that we are forgotten"
        self._cut_off, self._refused_session = False, 0

    def check(self) -> None:
        """Another thread may look at the gate at any moment."""
        if not self.world.heart.usable:
            return
        assert not self._registering, "open while a registration is under way"
        lie_ms = self.awake_ms - self._good_awake_ms
        timing = self.world.timing
        just_opened = self.awake_ms - self._opened_awake_ms <= timing.timeout_ms
        bound_ms = timing.trusted_for_ms if just_opened else self.gap_ms_max + timing.timeout_ms
        assert lie_ms <= bound_ms, f"open {lie_ms} ms after the server was good"

    def _unanswered(self, judged_ms: int) -> list[int]:
        """Of the pings that count: those without an answer in time."""
        timing = self.world.timing
        return [
            seq
            for seq, sent_ms in self.sent[-timing.fail_after :]
            if self._arrived.get(seq, NEVER_MS) > judged_ms and judged_ms - sent_ms >= timing.timeout_ms
        ]

    def _answered_promptly(self, judged_ms: int) -> list[int]:
        timeout_ms = self.world.timing.timeout_ms
        return [
            seq
            for seq, sent_ms in self.sent[-self.world.timing.fail_after :]
            if self._arrived.get(seq, NEVER_MS) <= min(judged_ms, sent_ms + timeout_ms)
        ]

    def _on_opening(self, change: Change) -> None:
        world = self.world
        if change.why == "registered":
            self._opened_awake_ms = self.awake_ms
        elif not world.stalled_ms:  # else a stall of ours may have made an answer late
            assert self._answered_promptly(world.heart.health._since_ms), "opens for a slow server"
        intervals = world.timing.hold_ms_max // world.timing.interval_ms
        doublings = intervals.bit_length() - 1
        for openings, openings_max in (
            (self._openings, OPENINGS_MAX + doublings),
            (self._openings_of_the_same_server, OPENINGS_MAX + OPENINGS_PER_INTERVAL_MAX * intervals),
        ):
            openings.append(world.now_ms)
            since_ms = world.now_ms - world.timing.hold_ms_max
            recent = [at_ms for at_ms in openings if at_ms > since_ms]
            assert len(recent) <= openings_max, f"flapping: {recent}"
