"""The server's health in simulated time: what goes wrong, from one seed, and what must be said of it by when.

The real watch, health machine, canary's rules and answers; threads, canary runs and clock are played.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random

from cache_server.beats import Lease
from cache_server.detection import Detection, detection
from cache_server.vitals import CANARY_TURN_MS, LOOP_TURN_MS, TURN_MS
from health.world import OK, STEP_MS, World, failed, unanswered, world_of

FAULTS_MAX = 4
NEVER_MS = 10**12
ALLOWED_LATE_MS = 2 * STEP_MS  # a turn of the world, and the answer's own
SETTLED_MS = 3 * TURN_MS  # from the end of a fault to the answers, where nothing else bounds it
KINDS = (
    "loop still", "loop leased", "lease overrun", "watch still", "http still", "canary hangs",
    "path broken", "memory gone", "asleep", "one canary lost",
    "draining", "loop dead", "watch dead", "canary dead",
)  # fmt: skip
LAST = ("draining", "loop dead", "watch dead", "canary dead")  # there is no way back from these


@dataclass(frozen=True)
class Expected:
    """Of a page's trouble, from the begin of the fault; None: it never comes."""

    by_ms: int | None = None
    not_before_ms: int | None = None


NEVER = Expected()


@dataclass(frozen=True)
class Fault:
    kind: str
    begin_ms: int
    end_ms: int
    live: Expected
    ready: Expected
    mended_ms: int  # from its end to good answers


class HealthWorld:
    def __init__(self, rng: Random, world: World) -> None:
        self.rng = rng
        self.world = world
        self.bounds: Detection = detection(world.config)
        self.faults: list[Fault] = []
        self.said: list[tuple[int, int, int]] = []  # (at ms, /live, /ready), where they change
        self._awake_ms = world.now_ms

    def live(self) -> None:
        self.world.started()
        kinds = [kind for kind in KINDS if kind not in LAST and self.rng.random() < 0.5]
        for _ in range(self.rng.randint(1, FAULTS_MAX)):
            self._pass_ms(self.rng.choice((500, 3_000, self.bounds.path_mended_ms)))
            self._suffer(self.rng.choice(kinds or ["asleep"]))
        self._pass_ms(max((fault.mended_ms for fault in self.faults), default=0) + TURN_MS)
        if self.rng.random() < 0.3:
            self._suffer(self.rng.choice(LAST))

    def _suffer(self, kind: str) -> None:
        begin_ms = self.world.now_ms
        lasts_ms = self.rng.choice((300, 1_500, 4_000, 12_000))
        fault = self._fault(kind, begin_ms, lasts_ms)
        self.faults.append(fault)
        self._begin(kind, lasts_ms)
        if kind != "asleep":
            self._pass_ms(lasts_ms)
        if kind not in LAST:
            self._end(kind)

    # What a fault is, and what may be said of it

    def _fault(self, kind: str, begin_ms: int, lasts_ms: int) -> Fault:
        live, ready, mended_ms = self._expected(lasts_ms)[kind]
        end_ms = NEVER_MS if kind in LAST else begin_ms + lasts_ms
        return Fault(kind, begin_ms, end_ms, live, ready, mended_ms)

    def _expected(self, lasts_ms: int) -> dict[str, tuple[Expected, Expected, int]]:
        """Of /live, of /ready, and from the fault's end to good answers."""
        config, bounds = self.world.config, self.bounds
        late_ms, stall_ms, lease_ms = config.late_after, config.stall_after, lasts_ms // 2
        unready_ms, dead_ms = bounds.loop_still_unready_ms, bounds.loop_still_dead_ms
        late, dead = Expected(unready_ms, late_ms), Expected(dead_ms, stall_ms)
        at_once = Expected(bounds.thread_dead_ms, 0)
        lost = Expected(None, 0) if config.canary_fail_after == 1 else NEVER
        hung_ms = config.canary_deadline + stall_ms + CANARY_TURN_MS + TURN_MS
        hung = Expected(max(bounds.path_broken_ms, hung_ms), 0)
        watched_late, watched_dead = (
            Expected(late_ms + TURN_MS, late_ms),
            Expected(stall_ms + TURN_MS, stall_ms),
        )
        return {
            "loop still": (dead, late, SETTLED_MS),
            "loop leased": (NEVER, late, SETTLED_MS),
            "lease overrun": (  # it counts as a movement that it is over
                Expected(lease_ms + dead_ms, lease_ms + stall_ms),
                Expected(lease_ms + unready_ms, late_ms),
                SETTLED_MS,
            ),
            "watch still": (watched_dead, watched_late, SETTLED_MS),
            "http still": (watched_dead, watched_dead, SETTLED_MS),
            "canary hangs": (NEVER, hung, self._mended_ms),
            "path broken": (NEVER, Expected(bounds.path_broken_ms, 0), self._mended_ms),
            "one canary lost": (NEVER, lost, self._mended_ms),
            "memory gone": (NEVER, Expected(bounds.memory_ms, 0), SETTLED_MS + bounds.memory_ms),
            "asleep": (NEVER, NEVER, 0),
            "draining": (NEVER, Expected(bounds.draining_ms + TURN_MS, 0), 0),
            "loop dead": (at_once, at_once, 0),
            "watch dead": (at_once, at_once, 0),
            "canary dead": (NEVER, Expected(None, 0), 0),
        }

    @property
    def _mended_ms(self) -> int:
        """A run may just have begun, in vain."""
        rules = self.world.config.trial_rules
        return self.bounds.path_mended_ms + rules.deadline_ms + rules.slack_ms

    def _begin(self, kind: str, lasts_ms: int) -> None:
        world, canary = self.world, self.world.canary
        what, _, how = kind.rpartition(" ")
        if how in ("leased", "overrun"):
            self._lease(10 * lasts_ms if how == "leased" else lasts_ms // 2)
        elif how in ("still", "hangs"):
            world.still.add(what)
            canary.takes_ms = None if what == "canary" else canary.takes_ms
        elif how == "dead":
            world.dead.add(what)
            canary.lives = canary.lives and what != "canary"
        elif how in ("broken", "lost"):
            canary.outcome = self.rng.choice((failed(), unanswered()))
        elif how == "gone":
            world.tiers.observe(what, "failed", "nothing of it can be had", world.now_ms)
        elif how == "asleep":
            self._sleep(lasts_ms)
        else:
            assert how == "draining"
            world.draining = True

    def _sleep(self, ms: int) -> None:
        """What has not mended by then takes longer by as much."""
        now_ms = self.world.now_ms
        self.faults = [
            replace(fault, mended_ms=fault.mended_ms + ms * (now_ms <= fault.end_ms + fault.mended_ms))
            for fault in self.faults
        ]
        self.world.sleep(ms)
        self._awake_ms = self.world.now_ms

    def _lease(self, ms: int) -> None:
        self.world.still.add("loop")
        self.world.vitals.loop.leases = (Lease("clearing", self.world.now_ms + ms),)

    def _end(self, kind: str) -> None:
        world = self.world
        world.still.clear()
        if world.vitals.loop.leases:  # as `Pulse.busy` ends
            world.vitals.loop.leases = ()
            world.pulses["loop"].tick(world.now_ms)
        world.canary.takes_ms, world.canary.outcome = 5, OK
        if kind == "memory gone":
            world.tiers.observe("memory", "ready", "", world.now_ms)

    # What is said

    def _pass_ms(self, ms: int) -> None:
        for _ in range(ms // STEP_MS):
            self.world.run(STEP_MS)
            self._check()
            is_lost = self.faults and self.faults[-1].kind == "one canary lost"
            if is_lost and self.world.watch.told.record.failures:
                self.world.canary.outcome = OK  # the next one is good again

    def _check(self) -> None:
        live, ready = self.world.get("/live")[0], self.world.get("/ready")[0]
        if not self.said or self.said[-1][1:] != (live, ready):
            self.said.append((self.world.now_ms, live, ready))
        self._check_page("/live", live, [(fault, fault.live) for fault in self.faults])
        self._check_page("/ready", ready, [(fault, fault.ready) for fault in self.faults])

    def _check_page(self, page: str, code: int, faults: list[tuple[Fault, Expected]]) -> None:
        now_ms = self.world.now_ms
        for fault, expected in faults:
            since_ms = now_ms - max(fault.begin_ms, self._awake_ms)
            in_force = now_ms <= fault.end_ms
            if in_force and expected.by_ms is not None and since_ms > expected.by_ms + ALLOWED_LATE_MS:
                assert code == 503, f"{page}: {fault.kind} for {since_ms} ms is not told"
        allowed = any(self._may_trouble(fault, expected) for fault, expected in faults)
        assert code == 200 or allowed, f"false alarm: {page}: {self.world.get(page)[1]['reason']}"

    def _may_trouble(self, fault: Fault, expected: Expected) -> bool:
        now_ms = self.world.now_ms
        if expected.not_before_ms is None or now_ms > fault.end_ms + fault.mended_ms + ALLOWED_LATE_MS:
            return False
        # The part may have moved for the last time up to a turn before it stood still.
        return (
            min(now_ms, fault.end_ms) - fault.begin_ms >= expected.not_before_ms - 2 * TURN_MS - LOOP_TURN_MS
        )


@contextmanager
def health_world(seed: int) -> Iterator[HealthWorld]:
    rng = Random(seed)
    late_ms, deadline_ms = rng.choice((800, 2_000)), rng.choice((300, 1_000))
    options = {
        "late_after": f"{late_ms}ms",
        "stall_after": f"{rng.choice((2, 5)) * late_ms}ms",
        "canary_idle": f"{2 * deadline_ms}ms",
        "canary_deadline": f"{deadline_ms}ms",
        "canary_fail_after": rng.choice(("1", "2", "3")),
    }
    with world_of(**options) as world:
        yield HealthWorld(rng, world)
