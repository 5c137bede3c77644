"""The server's health in simulated time: nothing is missed beyond its bound, nothing is told for no cause."""

import os
import random
import time
from collections import Counter
from collections.abc import Iterable

from sim.health_swarm import KINDS, HealthWorld, health_world
from sim.mutants.planting import silence

SEEDS = int(os.environ.get("SIM_SEEDS", "600")) // 4
FRESH_SEEDS = int(os.environ.get("SIM_FRESH_SEEDS", "300")) // 4


def live(seed: int) -> HealthWorld:
    with health_world(seed) as world, silence():
        try:
            world.live()
        except AssertionError as error:
            faults = [(fault.kind, fault.begin_ms, fault.end_ms) for fault in world.faults]
            raise AssertionError(f"seed {seed} at {world.world.now_ms}: {error}; {faults}") from error
    return world


def live_all(seeds: Iterable[int]) -> Counter[str]:
    began_s = time.perf_counter()
    kinds: Counter[str] = Counter()
    schedules = 0
    for seed in seeds:
        kinds.update(fault.kind for fault in live(seed).faults)
        schedules += 1
    took_s = time.perf_counter() - began_s
    print(f"{schedules} schedules, {60 * schedules / took_s:.0f} a minute: {dict(kinds)}")
    return kinds


def test_a_fixed_swarm() -> None:
    assert set(live_all(range(SEEDS))) == set(KINDS), "the swarm knows every fault"


def test_a_fresh_swarm() -> None:
    first = random.SystemRandom().randrange(10**9)
    print(f"from seed {first} on")
    live_all(range(first, first + FRESH_SEEDS))


def test_the_same_seed_is_the_same_history() -> None:
    assert [live(seed).said for seed in range(10)] == [live(seed).said for seed in range(10)]
