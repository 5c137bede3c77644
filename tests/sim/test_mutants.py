"""Planted bugs: the simulated worlds catch every one of them, or their checkers have a hole.

Here each bug lives through the one schedule that is on record as catching it; `make mutants` searches anew.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st

from sim.faults import Faults as HeartFaults
from sim.mutants.heartbeat import BelievesEveryPing
from sim.mutants.planting import AREAS, Mutant, mutants, silence
from sim.mutants.record import SEEDS_MAX, load, table
from sim.mutants.unit import SEEN_BY
from sim.whole.swarm import EVENTS, Faults, Setup
from sim.whole.system import System
from sim.world import World

MUTANTS = mutants()
RECORD = load()
MUTANTS_MIN = 40
DOCS = Path(__file__).parents[2] / "docs" / "reliability.md"
SHORT_TURNS = 10
FAST_RESTARTS = HeartFaults(crash=0.1, down_ms_max=1, silent_crash=True, operation=0.0)
MISTAKES = ("AttributeError", "NameError", "TypeError", "IndexError", "ImportError")

REQUESTS_LEFT_MAX = 8
PATIENT = settings(
    max_examples=200,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
)

every_mutant = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
every_rare_mutant = pytest.mark.parametrize(("name", "test"), SEEN_BY.items())
SIMULATED = [mutant for mutant in MUTANTS if mutant.name not in SEEN_BY]


@cache
def is_content(live: Callable[[int], None], seed: int) -> bool:
    """The world in which nothing is planted."""
    with silence():
        live(seed)
    return True


@pytest.mark.parametrize("mutant", SIMULATED, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught(mutant: Mutant) -> None:
    seed = RECORD[mutant.name]["seed"]
    assert is_content(mutant.live, seed)
    if not mutant.complaint(seed):
        caught = next((other for other in range(SEEDS_MAX) if mutant.complaint(other)), None)
        pytest.fail(f"not caught by seed {seed}, but by {caught} of {SEEDS_MAX}: run `make mutants`")


@every_mutant
def test_a_mutant_spoils_something_that_is_there(mutant: Mutant) -> None:
    assert mutant.strangers == []


@every_rare_mutant
def test_a_mutant_that_no_world_shows_is_seen_by_a_unit_test(name: str, test: str) -> None:
    command = [sys.executable, "-m", "sim.mutants.unit", name, f"tests/unit/{test}"]
    root = DOCS.parents[1]
    around = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests")))}
    ran = subprocess.run(command, cwd=root, env=around, capture_output=True, check=False, text=True)
    assert ran.returncode == pytest.ExitCode.TESTS_FAILED, ran.stdout
    assert "AssertionError" in ran.stdout or "assert " in ran.stdout, ran.stdout


def test_the_record_is_of_these_mutants() -> None:
    areas = {mutant.name: mutant.area for mutant in SIMULATED}
    assert {name: entry["area"] for name, entry in RECORD.items()} == areas, "re-run `make mutants`"
    assert {entry["area"] for entry in RECORD.values()} == set(AREAS)
    assert len(RECORD) >= MUTANTS_MIN


def test_no_mutant_is_caught_for_a_slip_of_its_own() -> None:
    slips = {name: entry["complaint"] for name, entry in RECORD.items()}
    assert {name: told for name, told in slips.items() if told.startswith(MISTAKES)} == {}


def test_the_docs_show_the_record() -> None:
    assert table(RECORD) in DOCS.read_text(), "re-run `make mutants`"


def test_a_restart_that_goes_unseen_is_explained() -> None:
    """The shortest history in which it does."""
    histories: list[World] = []

    def goes_wrong(rng: Random) -> bool:
        world = World(rng, health=BelievesEveryPing, faults=FAST_RESTARTS)
        try:
            world.live(SHORT_TURNS)
        except AssertionError:
            histories.append(world)
            return True
        return False

    find(st.randoms(use_true_random=False), goes_wrong, settings=PATIENT)
    shortest = min(histories, key=lambda world: (len(world.changes), len(world.checkers.sent)))
    for at_ms, old, new, why in shortest.changes:
        print(f"{at_ms} {old.value} -> {new.value}: {why}")
    assert len(shortest.changes) <= 4


def test_a_bug_in_the_whole_system_is_explained() -> None:
    """By few requests and no fault, of the many that a world may have."""
    bug = next(mutant for mutant in MUTANTS if mutant.name == "OffersAChunkMore")

    def goes_wrong(history: tuple[int, int, list[str]]) -> bool:
        seed, requests, kinds = history
        events = tuple((300 * at, kind) for at, kind in enumerate(kinds))
        setup = replace(Setup.draw(Random(seed)), requests=requests)
        try:
            System(Random(seed), setup, Faults(events=events)).live()
        except Exception:  # noqa: BLE001  whatever it is, it was found
            return True
        return False

    histories = st.tuples(
        st.integers(0, 100), st.integers(1, 30), st.lists(st.sampled_from(EVENTS), max_size=4)
    )
    with bug.planted(), silence():
        seed, requests, kinds = find(histories, goes_wrong, settings=PATIENT)
    print(f"{requests} requests to the world of seed {seed}, and {kinds or 'no fault'}")
    assert kinds == []
    assert requests <= REQUESTS_LEFT_MAX
