"""All planted bugs: where each is put in the place of what it spoils, and whether its world complains."""

import contextlib
import importlib
import inspect
import logging
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from types import ModuleType

import cache_server.answers
import cache_server.beats
import cache_server.health
import cache_server.http
import cache_server.service
import cache_server.trials
import cache_server.vitals
import cache_server.watch
import lmconnector.heartbeat
import lmconnector.scheduler
import lmconnector.stores
import sim.whole.cache_process
import sim.whole.engine
import sim.whole.member
import sim.whole.swarm
import sim.world
from sim.health_swarm import health_world
from sim.whole.system import System

TURNS, LONG_TURNS = 60, 600


def live_whole(seed: int) -> None:
    System(Random(seed)).live()


def live_heart(seed: int) -> None:
    rng = Random(seed)
    world = sim.world.World(rng, health=lmconnector.heartbeat.Health, heartbeat=sim.world.Heartbeat)
    world.live(TURNS if rng.random() < 0.9 else LONG_TURNS)


def live_health(seed: int) -> None:
    with health_world(seed) as world:
        world.live()


@dataclass(frozen=True)
class Ground:
    """Which classes of a module are spoiled, and where else the simulated worlds take them from."""

    module: str  # of the mutants, in this folder
    live: Callable[[int], None]
    places: dict[str, tuple[str, list[ModuleType]]]  # class -> its area, its places


REQUESTS, WORKERS, FENCING = "request records", "workers", "fencing"
SERVICE, INDEX, ARENA = "service", "index", "arena"
HEARTBEAT, HEALTH = "heartbeat", "health"
AREAS = (HEARTBEAT, HEALTH, REQUESTS, WORKERS, SERVICE, INDEX, ARENA, FENCING)
GROUNDS = (
    Ground("heartbeat", live_heart, {
        "Health": (HEARTBEAT, [lmconnector.heartbeat]),
        "Heartbeat": (HEARTBEAT, [sim.world]),
    }),
    Ground("engine", live_whole, {
        "SchedulerSide": (REQUESTS, [sim.whole.engine]),
        "Stores": (REQUESTS, [lmconnector.scheduler]),
        "Stock": (REQUESTS, [lmconnector.stores]),
        "Jobs": (REQUESTS, [lmconnector.scheduler]),
        "WatchedClient": (REQUESTS, [sim.whole.engine]),
        "WorkerSide": (WORKERS, [sim.whole.engine]),
        "ArenaMap": (FENCING, [sim.whole.member]),
        "Health": (HEARTBEAT, [lmconnector.heartbeat]),
    }),
    Ground("server", live_whole, {
        "Service": (SERVICE, [sim.whole.cache_process]),
        "Chunks": (SERVICE, [cache_server.service]),
        "Leases": (SERVICE, [cache_server.service]),
        "Limits": (SERVICE, [sim.whole.swarm]),
        "Registry": (FENCING, [sim.whole.cache_process]),
        "Index": (INDEX, [sim.whole.cache_process]),
        "Arena": (ARENA, [sim.whole.cache_process]),
        "Storage": (ARENA, [sim.whole.cache_process]),
    }),
    Ground("health", live_health, {
        "Health": (HEALTH, [cache_server.watch]),
        "Part": (HEALTH, [cache_server.vitals]),
        "Trials": (HEALTH, [cache_server.watch]),
        "Awake": (HEALTH, [cache_server.watch, cache_server.http]),
        "Facts": (HEALTH, [cache_server.http]),
    }),
)  # fmt: skip
ELSEWHERE = {  # than where its class belongs
    "CommitsIntoTheNextArena": FENCING, "KeepsTheOldArena": FENCING, "ForgetsWhatIsOut": FENCING,
    "WritesIntoAnyArena": FENCING, "NeverLooksAgain": FENCING, "CommitsForAnybody": FENCING,
    "ReusesGenerations": FENCING, "FreesReservedSlotsAtStart": FENCING, "IgnoresEpochs": FENCING,
    "NeverChangesItsEpoch": FENCING,
    "MixesNamespaces": SERVICE, "ServesHalfAnEngine": SERVICE,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    bug: type
    base: type
    area: str
    places: tuple[ModuleType, ...]
    live: Callable[[int], None]

    @property
    def name(self) -> str:
        return self.bug.__name__

    @contextlib.contextmanager
    def planted(self) -> Iterator[None]:
        for place in self.places:
            setattr(place, self.base.__name__, self.bug)
        try:
            yield
        finally:
            for place in self.places:
                setattr(place, self.base.__name__, self.base)

    def complaint(self, seed: int) -> str:
        """Of a world in which it is planted; empty if the world is content."""
        with self.planted(), silence():
            try:
                self.live(seed)
            except Exception as error:  # noqa: BLE001  whatever it is, it was found
                where = traceback.extract_tb(error.__traceback__)[-1]
                said = str(error).split("\n")[0] or (where.line or "")
                return said if isinstance(error, AssertionError) else f"{type(error).__name__}: {said}"
        return ""

    @property
    def strangers(self) -> list[str]:
        """What it defines and its base does not know: it would spoil nothing."""
        own = [kind for kind in self.bug.__mro__ if kind.__module__ == self.bug.__module__]
        used = "".join(inspect.getsource(kind) for kind in own)
        names = {name for kind in own for name in vars(kind) if not name.startswith("__")}
        return sorted(name for name in names if not hasattr(self.base, name) and f"self.{name}" not in used)


def mutants() -> list[Mutant]:
    return [mutant for ground in GROUNDS for mutant in _of(ground)]


def _of(ground: Ground) -> Iterator[Mutant]:
    module = importlib.import_module(f"sim.mutants.{ground.module}")
    for bug in vars(module).values():
        if (
            not inspect.isclass(bug)
            or bug.__module__ != module.__name__
            or "Not a mutant" in (bug.__doc__ or "")
        ):
            continue
        base = next(kind for kind in bug.__mro__ if kind.__module__ != module.__name__)
        area, places = ground.places[base.__name__]
        area = ELSEWHERE.get(bug.__name__, area)
        yield Mutant(bug, base, area, tuple(places), ground.live)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
