"""The health state machine: its bounds as numbers, and every input in every state."""

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmconnector.health import TRANSITIONS, Change, Health, Ping, Pong, Recover, State
from lmconnector.timing import JITTER_PERCENT, Timing

BOOT = 7
TIMINGS = [
    Timing(),
    Timing(interval_ms=4, timeout_ms=1),
    Timing(interval_ms=100, timeout_ms=100, fail_after=2, recover_timeout_ms=50, hold_ms_max=100),
    Timing(interval_ms=10_000, timeout_ms=250, fail_after=5),
    Timing(interval_ms=60_000, timeout_ms=60_000, hold_ms_max=30_000),
]


class Driver:
    """The heartbeat's loop without a thread: a server that answers each ping after `delay_ms`, or not."""

    def __init__(self, timing: Timing | None = None, now_ms: int = 1_000) -> None:
        self.changes: list[Change] = []
        self.timing = timing or Timing()
        self.health = Health(self.timing, self.changes.append)
        self.now_ms = now_ms
        self.pings: list[tuple[int, int]] = []  # (seq, at ms)
        self.attempts: list[int] = []
        self.answers = True

    def start(self) -> "Driver":
        self.health.start(self.now_ms)
        self.act()
        return self

    def registered(self) -> "Driver":
        self.health.on_recovered(self.attempts[-1], BOOT, "", self.now_ms)
        self.tick()
        return self

    def tick(self) -> None:
        self.health.on_tick(self.now_ms)
        self.act()

    def act(self) -> None:
        while actions := self.health.take_actions():
            for action in actions:
                if isinstance(action, Recover):
                    self.attempts.append(action.attempt)
                else:
                    self._send(action)

    def _send(self, ping: Ping) -> None:
        self.pings.append((ping.seq, self.now_ms))
        self.health.on_sent(ping.seq, self.now_ms)
        if self.answers:
            self.pong(ping.seq)

    def pong(self, seq: int, boot: int = BOOT, *, known: bool = True, ready: bool = True) -> None:
        self.health.on_pong(Pong(seq, boot, known, ready), self.now_ms)

    def run_until(self, end: Callable[[], bool], limit_ms: int) -> int:
        """-> how long it took"""
        began_ms = self.now_ms
        while not end():
            self.now_ms = self.health.wake_at_ms
            assert self.now_ms - began_ms <= limit_ms, f"not within {limit_ms} ms"
            self.tick()
        return self.now_ms - began_ms

    def run_for(self, length_ms: int) -> None:
        end_ms = self.now_ms + length_ms
        while not self.is_in(State.STOPPED) and self.health.wake_at_ms <= end_ms:
            self.now_ms = max(self.now_ms, self.health.wake_at_ms)
            self.tick()
        self.now_ms = end_ms

    def is_in(self, state: State) -> bool:
        return self.health.state is state


@pytest.fixture
def driver() -> Driver:
    return Driver().start().registered()


@pytest.mark.parametrize(
    "values",
    [
        {"interval_ms": 3},
        {"interval_ms": 0},
        {"timeout_ms": 0},
        {"interval_ms": 100, "timeout_ms": 101},
        {"fail_after": 1},
    ],
)
def test_timings_that_make_no_sense_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(AssertionError):
        Timing(**values)


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("phase_ms", [0, 1, 7, 20])
def test_trap_08_a_hang_is_found_within_the_bound(timing: Timing, phase_ms: int) -> None:
    driver = Driver(timing, now_ms=1_000 + phase_ms).start().registered()
    driver.run_for(20 * timing.interval_ms)
    driver.now_ms = driver.pings[-1][1]  # the server hangs right after its last pong
    driver.answers = False
    shut_ms = driver.run_until(lambda: not driver.health.usable, timing.trusted_for_ms)
    found_ms = shut_ms + driver.run_until(lambda: driver.is_in(State.DEGRADED), timing.hang_found_within_ms)
    assert found_ms <= timing.hang_found_within_ms
    assert shut_ms <= timing.hang_found_within_ms - (timing.fail_after - 1) * timing.timeout_ms


@pytest.mark.parametrize("timing", TIMINGS)
def test_trap_08_a_server_that_is_back_is_used_within_an_interval_and_a_registration(
    timing: Timing,
) -> None:
    driver = Driver(timing).start().registered()
    driver.answers = False
    driver.run_until(lambda: driver.is_in(State.DEGRADED), 2 * timing.hang_found_within_ms)
    driver.run_for(100 * timing.interval_ms)
    driver.answers = True
    limit_ms = timing.interval_ms * (100 + JITTER_PERCENT) // 100
    driver.run_until(lambda: driver.is_in(State.RECOVERING), limit_ms)
    driver.registered()
    assert driver.health.usable


def test_the_bound_for_a_hang_is_the_documented_formula() -> None:
    for timing in TIMINGS:
        bound_ms = 11 * timing.interval_ms // 10 + timing.fail_after * timing.timeout_ms
        assert timing.hang_found_within_ms == bound_ms
    assert Timing().hang_found_within_ms == 2_600


def test_trap_01_a_lost_ping_costs_a_suspicion_and_no_more(driver: Driver) -> None:
    driver.run_for(10_000)
    sent = len(driver.pings)
    driver.answers = False
    driver.run_until(lambda: len(driver.pings) > sent, 2_000)
    driver.answers = True
    driver.run_for(60_000)
    suspicion, end = driver.changes[2:]
    assert (suspicion.new, suspicion.why) == (State.SUSPECT, "ping unanswered for 500 ms")
    assert (end.new, end.lasted_ms) == (State.HEALTHY, 0), "the next ping was due at once"


def test_trap_11_a_hung_data_path_behind_good_pings_opens_the_gate_ever_more_rarely(driver: Driver) -> None:
    """For an hour each operation runs into its deadline, and every ping is answered at once."""
    openings, hour_ms, deadline_ms = 0, 3_600_000, 450
    end_ms = driver.now_ms + hour_ms
    while driver.now_ms < end_ms:
        openings += 1
        driver.now_ms += deadline_ms
        driver.health.on_disappointment(driver.now_ms)
        driver.tick()
        driver.run_until(lambda: driver.health.usable, 2 * driver.timing.hold_ms_max)
    doublings = (driver.timing.hold_ms_max // driver.timing.interval_ms).bit_length()
    assert openings <= hour_ms // driver.timing.hold_ms_max + doublings + 1
    assert {change.new for change in driver.changes[2:]} == {State.SUSPECT, State.HEALTHY}


def test_a_pong_to_a_ping_from_before_a_disappointment_does_not_end_it(driver: Driver) -> None:
    driver.answers = False
    driver.run_until(lambda: len(driver.pings) == 2, 2_000)
    old = driver.pings[-1][0]
    driver.now_ms += 100
    driver.health.on_disappointment(driver.now_ms)
    driver.tick()
    driver.pong(old)
    assert driver.is_in(State.SUSPECT), "it was answered before anybody waited in vain"
    asked = driver.pings[-1][0]
    assert asked == old + 1, "asked at once"
    driver.now_ms += 100
    driver.health.on_disappointment(driver.now_ms)
    driver.pong(asked)
    assert driver.is_in(State.SUSPECT), "and once more"
    driver.answers = True
    driver.run_until(lambda: driver.health.usable, driver.timing.interval_ms // 4)


def test_many_disappointments_do_not_hide_a_hang(driver: Driver) -> None:
    driver.answers = False
    began_ms = driver.now_ms
    while not driver.is_in(State.DEGRADED):
        driver.now_ms = min(driver.now_ms + 20, driver.health.wake_at_ms)
        driver.health.on_disappointment(driver.now_ms)
        driver.tick()
        assert driver.now_ms - began_ms <= driver.timing.hang_found_within_ms


def test_gaps_between_pings_stay_within_the_jitter(driver: Driver) -> None:
    driver.run_for(100_000)
    times = [at_ms for _, at_ms in driver.pings]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times[1:])]
    assert min(gaps) >= 900
    assert max(gaps) <= 1_100


def test_workers_that_started_within_a_few_ms_do_not_beat_as_one() -> None:
    drivers = [Driver(now_ms=1_000 + offset_ms).start().registered() for offset_ms in range(8)]
    for driver in drivers:
        driver.run_for(60_000)
    last = sorted(driver.pings[-1][1] for driver in drivers)
    assert last[-1] - last[0] > 50


@pytest.mark.parametrize("timing", TIMINGS)
def test_the_hold_doubles_from_nothing_to_its_maximum(timing: Timing) -> None:
    driver = Driver(timing).start().registered()
    shut = []
    for _ in range(16):
        driver.health.on_disappointment(driver.now_ms)
        driver.tick()
        shut.append(driver.run_until(lambda: driver.health.usable, 2 * timing.hold_ms_max + 200_000))
    gap_ms = timing.interval_ms * (100 + JITTER_PERCENT) // 100
    assert shut[0] == 0
    for number, length_ms in enumerate(shut[1:]):
        hold_ms = min(timing.interval_ms * 2**number, timing.hold_ms_max)
        assert hold_ms <= length_ms <= hold_ms + gap_ms


def test_a_long_time_without_trouble_forgives_without_any_success(driver: Driver) -> None:
    for _ in range(5):
        driver.health.on_disappointment(driver.now_ms)
        driver.tick()
        driver.run_until(lambda: driver.health.usable, 60_000)
    driver.run_for(2 * driver.timing.hold_ms_max)
    driver.health.on_disappointment(driver.now_ms)
    driver.tick()
    assert driver.health.usable, "the ping that asked at once was answered"


def test_a_change_tells_how_long_the_state_and_the_outage_lasted(driver: Driver) -> None:
    driver.now_ms = 1_500
    driver.health.on_disconnected(1_500)
    driver.now_ms = 4_000
    driver.tick()
    driver.now_ms = 4_250
    driver.registered()
    assert [(change.new, change.lasted_ms, change.unusable_ms) for change in driver.changes] == [
        (State.RECOVERING, 0, 0),
        (State.HEALTHY, 0, 0),
        (State.DEGRADED, 500, 0),
        (State.RECOVERING, 2_500, 0),
        (State.HEALTHY, 250, 2_750),
    ]


def test_a_pong_counts_once(driver: Driver) -> None:
    driver.run_for(1_500)
    seq = driver.pings[-1][0]
    for _ in range(3):
        driver.pong(seq)
    driver.pong(999_999)
    assert driver.health.late_pongs == 4
    assert driver.health.usable


def test_one_registration_runs_at_a_time(driver: Driver) -> None:
    driver.health.on_disconnected(driver.now_ms)
    driver.run_for(2_000)
    assert driver.attempts == [1, 2]
    driver.run_for(60_000)  # the server answers pings, the registration is never answered
    assert driver.attempts == [1, 2]
    assert driver.is_in(State.DEGRADED)
    driver.health.on_recovered(2, BOOT, "", driver.now_ms)
    assert driver.is_in(State.DEGRADED)
    driver.run_for(2_000)
    assert driver.attempts == [1, 2, 3]


def test_what_other_threads_may_ask(driver: Driver) -> None:
    assert not driver.health.success_is_news(driver.now_ms)
    driver.health.on_disappointment(driver.now_ms)
    driver.tick()
    assert driver.health.usable
    assert not driver.health.success_is_news(driver.now_ms + 999)
    assert driver.health.success_is_news(driver.now_ms + 1_000)


WAYS: dict[State, Callable[[Driver], object]] = {
    State.DORMANT: lambda driver: None,
    State.RECOVERING: lambda driver: driver.start(),
    State.HEALTHY: lambda driver: driver.start().registered(),
    State.SUSPECT: lambda driver: driver.start().registered().health.on_disappointment(driver.now_ms),
    State.DEGRADED: lambda driver: driver.start().registered().health.on_disconnected(driver.now_ms),
    State.STOPPED: lambda driver: driver.start().health.stop("shutdown", driver.now_ms),
}
INPUTS: dict[str, Callable[[Driver], object]] = {
    "tick": lambda driver: driver.tick(),
    "later": lambda driver: driver.run_for(700) if driver.pings else None,
    "much later": lambda driver: driver.run_for(20_000) if driver.pings else None,
    "silence": lambda driver: setattr(driver, "answers", not driver.answers),
    "pong": lambda driver: driver.pong(driver.health._seq),
    "old pong": lambda driver: driver.pong(driver.health._seq - 1),
    "unknown": lambda driver: driver.pong(driver.health._seq, known=False),
    "draining": lambda driver: driver.pong(driver.health._seq, ready=False),
    "restarted": lambda driver: driver.pong(driver.health._seq, boot=8),
    "disappointed": lambda driver: driver.health.on_disappointment(driver.now_ms),
    "success": lambda driver: driver.health.on_success(driver.now_ms),
    "forgotten": lambda driver: driver.health.on_forgotten(driver.now_ms),
    "connected": lambda driver: driver.health.on_connected(driver.now_ms),
    "disconnected": lambda driver: driver.health.on_disconnected(driver.now_ms),
    "registered": lambda driver: driver.registered() if driver.health._registering else None,
    "refused": lambda driver: (
        driver.health.on_recovered(driver.health._attempt, 0, "refused", driver.now_ms)
        if driver.health._registering
        else None
    ),
    "stop": lambda driver: driver.health.stop("shutdown", driver.now_ms),
}


@pytest.mark.parametrize("what", INPUTS)
@pytest.mark.parametrize("state", State)
def test_every_input_is_taken_in_every_state(state: State, what: str) -> None:
    driver = Driver()
    driver.answers = False
    WAYS[state](driver)
    assert driver.health.state is state
    INPUTS[what](driver)
    if state is State.DORMANT:
        assert driver.health.state in (State.DORMANT, State.STOPPED)
    if state is State.STOPPED:
        assert driver.is_in(State.STOPPED)
        driver.tick()
        assert driver.health.take_actions() == []


@given(st.lists(st.sampled_from(sorted(INPUTS)), max_size=60))
def test_no_history_breaks_it(inputs: list[str]) -> None:
    driver = Driver().start()
    for what in inputs:
        INPUTS[what](driver)
        health = driver.health
        assert len(health._unanswered) <= driver.timing.fail_after
        assert health._hold_ms <= driver.timing.hold_ms_max
        assert health.usable is (health.state is State.HEALTHY)
        assert not (health.usable and health._registering)
        if not driver.is_in(State.STOPPED):
            driver.tick()
            assert health.wake_at_ms > driver.now_ms, "a hot loop"
    assert all(change.new in TRANSITIONS[change.old] for change in driver.changes)
    assert [later.old for later in driver.changes[1:]] == [change.new for change in driver.changes[:-1]]


def test_a_stop_leaves_nothing_to_do() -> None:
    health = Health(Timing(), lambda change: None)
    health.start(1_000)
    health.stop("shutdown", 1_000)
    health.stop("shutdown", 1_001)
    assert health.take_actions() == []
