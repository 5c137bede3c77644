"""The real heartbeat in a simulated world: whatever goes wrong, it is not led astray, and it recovers."""

import os
import time
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmconnector.health import TRANSITIONS, State
from sim.repeat import printed
from sim.world import World

SEEDS = int(os.environ.get("SIM_SEEDS", "600"))
TURNS = 60
LONG_TURNS = 2_000


def live(seed: int, turns: int = TURNS) -> World:
    world = World(Random(seed))
    try:
        world.live(turns)
    except AssertionError as error:
        raise AssertionError(f"seed {seed}, {turns} turns: {error}; {world.faults}") from error
    return world


def test_the_swarm() -> None:
    began_s = time.perf_counter()
    worlds = [live(seed) for seed in range(SEEDS)]
    took_s = time.perf_counter() - began_s
    hours = sum(world.now_ms for world in worlds) / 3_600_000
    registrations = sum(world.checkers.registrations for world in worlds)
    print(f"{SEEDS} schedules, {SEEDS / took_s:.0f}/s: {hours:.0f} hours, {registrations} registrations")
    walked = {(old, new) for world in worlds for _, old, new, _ in world.changes}
    legal = {(old, new) for old, news in TRANSITIONS.items() for new in news}
    assert walked == legal - {(State.DORMANT, State.STOPPED)}, "the swarm walks every way"


@pytest.mark.parametrize("seed", range(4))
def test_a_long_life(seed: int) -> None:
    live(seed, LONG_TURNS)


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.randoms(use_true_random=False), st.integers(1, TURNS))
def test_any_life(rng: Random, turns: int) -> None:
    """Slower than the swarm, but it shrinks what it finds."""
    World(rng).live(turns)


def test_the_same_seed_is_the_same_history_whatever_the_hash_seed() -> None:
    program = (
        "from sim.test_heartbeat_sim import live\nprint([live(seed, turns=30).trace for seed in range(20)])"
    )
    assert printed(program) == {f"{[live(seed, turns=30).trace for seed in range(20)]}\n"}
