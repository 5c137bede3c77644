"""A network, a server, an engine's operations and a clock, all driven by one PRNG.  Nothing here sleeps.

The world is the ports of `Heartbeat`: its link, its clock, the thread in which it registers.  Whatever goes
wrong, the checkers look on; then all faults end, and the gate must open and stay open.
"""

import hashlib
import heapq
import itertools
from collections.abc import Callable
from random import Random

from cache_server.protocol import messages as m
from lmconnector.errors import RegistrationError
from lmconnector.health import Change, Health, State, Timing
from lmconnector.heartbeat import Heartbeat, Membership
from lmconnector.link import Event
from sim.checkers import Checkers
from sim.faults import Faults
from sim.server import Server

TIMINGS = (
    Timing(),
    Timing(),
    Timing(interval_ms=500, timeout_ms=500, fail_after=2),
    Timing(interval_ms=3_000, timeout_ms=300, fail_after=5, hold_ms_max=10_000),
)
OPERATION_DEADLINE_MS = 450
OPERATIONS_MAX = 3  # in flight
CALM_MS = 3_000  # from the end of the faults until their last messages are in
SETTLED_TURNS = 30


class World:
    def __init__(
        self,
        rng: Random,
        health: type[Health] = Health,
        heartbeat: type[Heartbeat] = Heartbeat,
        faults: Faults | None = None,
    ) -> None:
        self.rng = rng
        self.timing = Timing() if faults else rng.choice(TIMINGS)
        self.faults = faults or Faults.swarm(rng)
        self.now_ms = 1_000
        self.stalled_ms = 0  # in all
        self.changes: list[tuple[int, State, State, str]] = []
        self.operations = 0  # in flight
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._tie = itertools.count()
        self._arrived: list[Event] = []
        self._woken = False
        self._closed = False
        self._outcome: Membership | str = ""
        self.server = Server(self)
        self.heart = heartbeat(lambda: self, self._register, self.timing, self._clock, self._run)
        self.heart.health = health(self.timing, self._on_change)
        self.checkers = Checkers(self)

    @property
    def good(self) -> bool:
        """Whether the gate ought to be open."""
        membership = self.heart.membership
        return membership is not None and self.server.session == membership.session and self.server.serves

    @property
    def trace(self) -> str:
        """Equal traces: equal histories."""
        pings = self.checkers.sent
        return hashlib.sha256(f"{self.now_ms} {self.changes} {pings}".encode()).hexdigest()

    # The link

    def send(self, request: m.Request) -> bool:
        assert isinstance(request, m.Ping)
        assert not self._closed
        self.checkers.on_ping(request.seq)
        if self.server.connected:
            self.transmit(lambda: self.server.ping(request))
        return self.server.connected

    def poll(self, timeout_ms: int) -> list[Event]:
        assert timeout_ms >= 0
        self._inject()
        until_ms = self.now_ms + timeout_ms
        while not (self._arrived or self._woken) and self._events and self._events[0][0] <= until_ms:
            self._run_event()
        if not (self._arrived or self._woken):
            self._advance(max(self.now_ms, until_ms))
        self._woken = False
        events, self._arrived = self._arrived, []
        self.checkers.on_heard(events)
        return events

    def wake(self) -> None:
        self._woken = True

    def close(self) -> None:
        self._closed = True

    # The clock and the registration's thread

    def _clock(self) -> int:
        if not self.checkers.stalling and self.chance(self.faults.stall):
            stall_ms = self.rng.randint(1, self.faults.stall_ms_max)
            self.checkers.stalling = True
            self._run_until(self.now_ms + stall_ms)
            self.checkers.stalling = False
            self.stalled_ms += stall_ms
        return self.now_ms

    def _run(self, work: Callable[[], None]) -> None:
        self.checkers.on_registration_begun()
        ends_ms = self.now_ms + self.rng.randint(0, self.faults.registration_ms_max)
        if self.chance(self.faults.hang_registration):
            ends_ms += self.rng.randint(0, 60_000)
        self._outcome = "no answer"
        self.at(self.rng.randint(self.now_ms, ends_ms), self._ask_to_register)
        self.at(ends_ms, lambda: self._end_registration(work))

    def _ask_to_register(self) -> None:
        self._outcome = self.server.register()

    def _end_registration(self, work: Callable[[], None]) -> None:
        self.checkers.on_registration_ended()
        work()

    def _register(self) -> Membership:
        if isinstance(self._outcome, str):
            raise RegistrationError(self._outcome)
        return self._outcome

    # Time, chance and the network

    def at(self, at_ms: int, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_ms, next(self._tie), what))

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.rng.random() < probability

    def delay_ms(self) -> int:
        return self.rng.randint(0, self.faults.delay_ms_max)

    def transmit(self, what: Callable[[], None]) -> None:
        if not self.chance(self.faults.loss):
            for _ in range(1 + self.chance(self.faults.duplicate)):
                self.at(self.now_ms + self.delay_ms(), what)

    def arrive(self, event: Event) -> None:
        self._arrived.append(event)
        if isinstance(event, m.Pong):
            self.checkers.on_arrival(event.seq)

    def _run_event(self) -> None:
        at_ms, _, what = heapq.heappop(self._events)
        self._advance(max(self.now_ms, at_ms))
        what()

    def _run_until(self, at_ms: int) -> None:
        while self._events and self._events[0][0] <= at_ms:
            self._run_event()
        self._advance(max(self.now_ms, at_ms))

    def _advance(self, to_ms: int) -> None:
        self.checkers.on_time_passes(to_ms)
        self.now_ms = to_ms
        self.checkers.on_time_passed()

    def _inject(self) -> None:
        self.server.suffer()
        if self.chance(self.faults.garbage):
            self.arrive(m.Done(id=self.rng.randint(0, 9), boot=1))
        if self.chance(self.faults.disappoint):
            self.heart.disappointed()
        if self.operations < OPERATIONS_MAX and self.chance(self.faults.operation) and self.heart.usable:
            Operation(self).begin()

    def _on_change(self, change: Change) -> None:
        self.changes.append((self.now_ms, change.old, change.new, change.why))
        self.checkers.on_change(change)

    # A life

    def live(self, turns: int) -> None:
        late_ms = self.rng.randint(1, 20_000) if self.chance(0.3) else 0
        self.at(self.now_ms + late_ms, self.server.start)
        self.heart.begin()
        self._turn(turns)
        if self.chance(0.8):
            self._heal()
        self._stop()

    def _turn(self, turns: int = 1) -> None:
        for _ in range(turns):
            self.heart.step()
            self.checkers.on_turn()

    def _heal(self) -> None:
        timing = self.timing
        self.faults = self.faults.healed(self.timing.timeout_ms // 3)
        self.server.heal()
        self._calm_down()
        self._open_within(timing.hold_ms_max + timing.hang_found_within_ms, "recover")
        if self.chance(0.5):
            self.server.crash(down_ms=1)
            self._turn()
            self._open_within(2 * timing.interval_ms, "use a new server, whatever the old one was like")
            self._calm_down()  # some operations have asked the old one
            self._open_within(timing.interval_ms + timing.hang_found_within_ms, "use a good server")
        settled = len(self.changes)
        self._turn(SETTLED_TURNS)
        assert self.changes[settled:] == [], "changes although nothing happens"

    def _calm_down(self) -> None:
        """Until the last of the trouble is known and over."""
        calm_ms = self.now_ms
        while self.now_ms < calm_ms + CALM_MS + self.timing.hang_found_within_ms:
            self._turn()
            if not self.server.serves or not self.server.connected or self.checkers.registering:
                calm_ms = self.now_ms

    def _open_within(self, limit_ms: int, what: str) -> None:
        end_ms = self.now_ms + limit_ms
        while not self.heart.usable:
            assert self.now_ms < end_ms, f"does not {what}"
            self._turn()

    def _stop(self) -> None:
        """In whatever state; and whatever is still under way comes to its end afterwards."""
        self.heart.stop(timeout_ms=0)
        self.heart.end()
        settled, pings = len(self.changes), len(self.checkers.sent)
        self.heart.ensure_started()
        self._run_until(self.now_ms + 120_000)
        assert (len(self.changes), len(self.checkers.sent)) == (settled, pings)
        assert self.heart.health.state is State.STOPPED
        assert not self.heart.usable
        assert self.heart._thread is None


class Operation:
    """Of the engine: a lookup, a reservation, a commit."""

    def __init__(self, world: World) -> None:
        assert world.heart.membership is not None, "open without a registration"
        self._world = world
        self._session = world.heart.membership.session
        self._open = True

    def begin(self) -> None:
        world = self._world
        world.operations += 1
        world.at(world.now_ms + world.delay_ms(), self._arrive)
        world.at(world.now_ms + OPERATION_DEADLINE_MS, self._give_up)

    def _arrive(self) -> None:
        world = self._world
        if world.server.answers_operation():
            tell = self._succeed if world.server.session == self._session else self._be_refused
            world.at(world.now_ms + world.delay_ms(), lambda: self._end(tell))

    def _end(self, tell: Callable[[], None]) -> None:
        if self._open:
            self._open = False
            self._world.operations -= 1
            tell()

    def _succeed(self) -> None:
        self._world.checkers.on_success()
        self._world.heart.succeeded()

    def _be_refused(self) -> None:
        self._world.heart.forgotten(self._session)
        self._world.checkers.on_refusal(self._session)

    def _give_up(self) -> None:
        self._end(self._wait_in_vain)

    def _wait_in_vain(self) -> None:
        self._world.heart.disappointed()
        assert not self._world.heart.usable, "another operation may wait in vain"
