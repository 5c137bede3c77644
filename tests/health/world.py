"""The server's health in simulated time: the real watch and the real answers, threads and clock played."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

from cache_server import config as configuration
from cache_server.answers import Answer
from cache_server.canary import Order
from cache_server.counters import Counters
from cache_server.endpoints import Endpoints, Tiers, describe
from cache_server.http import Answering
from cache_server.pages import Waiting
from cache_server.published import Published
from cache_server.report import describe as describe_status
from cache_server.trials import Outcome, Result
from cache_server.vitals import CANARY_TURN_MS, LOOP_TURN_MS, SNAPSHOT_MS, TURN_MS, Vitals
from cache_server.watch import Watch
from kit import World as ServiceWorld
from kit import make_service

STEP_MS = 50
OK = Outcome(Result.OK, took_ms=5)


def failed(stage: str = "read", reason: str = "wrong") -> Outcome:
    return Outcome(Result.FAILED, stage, reason, 5)


def unanswered() -> Outcome:
    return Outcome(Result.FAILED, "lookup", "no answer", 1_600, unanswered=True)


class PlayedCanary:
    """Ends each run after `takes_ms` with `outcome`; None: its thread hangs."""

    def __init__(self, world: "World") -> None:
        self.outcome = OK
        self.takes_ms: int | None = 5
        self.lives = True
        self.at_stage = "lookup"
        self.orders: list[Order] = []
        self._world = world
        self._running: tuple[int, int] | None = None  # generation, since

    def start(self) -> None:
        pass

    def stop(self, wait_s: float) -> None:
        pass

    def order(self, generation: int, order: Order, when_done: object) -> None:
        assert self._running is None, "one at a time"
        self.orders.append(order)
        self._running = (generation, self._world.now_ms)

    def take_outcomes(self) -> list[tuple[int, Outcome]]:
        if self._running is None or self.takes_ms is None:
            return []
        generation, since_ms = self._running
        if self._world.now_ms - since_ms < self.takes_ms:
            return []
        self._running = None
        return [(generation, self.outcome)]


class World:
    def __init__(self, directory: Path, options: dict[str, str]) -> None:
        self.now_ms = 1_000_000
        flags = {"dir": str(directory), "capacity": "16MiB", **options}
        self.config = configuration.parse(configuration.gather(flags, {}, None))
        self.vitals = Vitals(self.config)
        self.canary = PlayedCanary(self)
        self.watch = Watch(self.config, self.vitals, self.canary, lambda: self.now_ms)
        self.answering = Answering(self.watch)
        self.service_world: ServiceWorld = make_service(limits=self.config.limits)
        self.tiers = Tiers()
        self.tiers.observe("memory", "ready", "", self.now_ms)
        self.turned = self.draining = self.paused = self.stopped = False
        self.watch.source = lambda: self.published
        self.still: set[str] = set()  # parts that do not turn
        self.dead: set[str] = set()
        self.slept_ms = 0
        self.pulses = {
            part.name: part.begin(self.now_ms, self._life_of(part.name)) for part in self.vitals.parts
        }
        self.pulses["populate"].end()
        self.endpoints = self._endpoints()

    def _life_of(self, name: str):
        return lambda: name not in self.dead

    def _endpoints(self) -> Endpoints:
        self.service_world.now_ms = self.now_ms
        service = self.service_world.service
        return describe(service, self.config.requirement, self.tiers, self.now_ms)

    @property
    def published(self) -> Published:
        status = describe_status(self.service_world.service, self.now_ms, 1, 0, "")
        return Published(7, self.turned, self.draining, self.paused, self.stopped, status, self.endpoints)

    @property
    def counters(self) -> Counters:
        return self.service_world.service.counters

    def started(self) -> "World":
        self.turned = True
        self.run(1_000)
        assert self.get("/ready")[0] == 200, self.get("/health")
        return self

    def run(self, passed_ms: int) -> None:
        """Every part turns that is not in `still`, each at its own pace."""
        for _ in range(passed_ms // STEP_MS):
            self.now_ms += STEP_MS
            self._turn("loop", LOOP_TURN_MS)
            self._turn("canary", CANARY_TURN_MS)
            if self._turn("http", TURN_MS):
                self.answering.turn(self.now_ms)
            if self._turn("watch", TURN_MS):
                self.watch.turn(self.now_ms)

    def _turn(self, name: str, period_ms: int) -> bool:
        if name in self.still | self.dead or self.now_ms % period_ms:
            return False
        part = getattr(self.vitals, name)
        self.pulses[name].tick(self.now_ms, part.beat.since_ms)
        if name == "loop" and not self.now_ms % SNAPSHOT_MS:
            self.endpoints = self._endpoints()
        return True

    def sleep(self, passed_ms: int) -> None:
        """The whole process is stopped, and goes on."""
        self.now_ms += passed_ms

    def get(self, path: str) -> tuple[int, dict]:
        answer = self.ask(path)
        assert isinstance(answer, Answer)
        return answer.code, json.loads(answer.body)

    def ask(self, path: str) -> Answer | Waiting:
        name, _, query = path.partition("?")
        return self.answering.pages[name](self.now_ms, query)

    def first_ms(self, path: str, code: int, within_ms: int) -> int:
        """How long until the page says that."""
        began_ms = self.now_ms
        while self.get(path)[0] != code:
            self.run(STEP_MS)
            assert self.now_ms - began_ms <= within_ms, f"{path} has not said {code} within {within_ms} ms"
        return self.now_ms - began_ms

    @property
    def states(self) -> list[str]:
        return [transition.new.value for transition in self.watch.told.verdict.transitions]


@contextmanager
def world_of(**options: str) -> Iterator[World]:
    directory = Path(tempfile.mkdtemp(prefix="csw-"))
    world = World(directory, options)
    try:
        yield world
    finally:
        world.vitals.close()
        rmtree(directory)
