"""Each deed is done to a real server, without an engine: it heals, and is a new server only if so planned."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from random import Random

import pytest

from cache_server.client import RefusedError
from cache_server.session import Session
from chaos.campaign.deeds import DEEDS, Deed, of_the_connection
from chaos.campaign.orders import ORDERS
from chaos.campaign.plan import FAULTS, After
from chaos.campaign.stage import Stage, stage
from processes import eventually
from tools import lacking

pytestmark = pytest.mark.chaos

LASTS_S = 0.4
HASHES = [bytes([number]) * 32 for number in range(1, 4)]
CONTENTS = [bytes([number]) * 4096 for number in range(1, 4)]


@pytest.fixture(scope="module")
def made() -> Iterator[Stage]:
    with stage(seed=1) as made:
        yield made


def works_again(made: Stage) -> bool:
    """A server may refuse until its next turn: the resume of a pause is only told to it."""
    try:
        return stores_and_loads(made)
    except RefusedError:
        return False


def stores_and_loads(made: Stage) -> bool:
    """Through the relay."""
    with contextlib.closing(Session(made.front, "engine", len(CONTENTS[0]))) as session:
        session.clear()
        session.store(HASHES, CONTENTS)
        return session.load(HASHES) == CONTENTS


@pytest.mark.parametrize("kind", [kind for kind in DEEDS if kind != "engine frozen"])
def test_a_deed_heals_and_is_a_new_server_only_if_so_planned(kind: str, made: Stage) -> None:
    fault = FAULTS[kind]
    if fault.needs_a_mount and made.mount is None:
        lacking("this user may not mount")
    before = made.cache.status().boot
    DEEDS[kind](Deed(made, {}, max(LASTS_S, fault.lasts_s[0]), Random(1)))
    eventually(lambda: made.cache.answers(1_000), "an answer", 20.0)
    eventually(lambda: works_again(made), "a load", 20.0)
    status = made.cache.check_conservation()
    assert (status.boot != before) is (fault.after is After.NEW)
    assert made.strange_files() == ()
    assert made.deaths == 0


class AtWork(Deed):
    """While there is no memory, engines store."""

    def wait(self) -> None:
        super().wait()
        status = self.stage.cache.status()
        assert "No space left" in status.population_failure
        with contextlib.suppress(RefusedError):
            assert stores_and_loads(self.stage)
        assert self.stage.cache.answers(5_000), "it ended at the first write to memory that is not there"


def test_a_server_that_runs_out_of_memory_lives_on_what_it_has(made: Stage) -> None:
    if made.mount is None:
        lacking("this user may not mount")
    later = next(seed for seed in range(100) if Random(seed).random() >= 0.5)
    assert DEEDS["no memory"](AtWork(made, {}, 2.0, Random(later))) == "during the start"
    assert stores_and_loads(made)


@pytest.mark.parametrize("kind", ORDERS)
def test_a_fault_of_the_connection_ends(kind: str, made: Stage) -> None:
    before = made.cache.status().boot
    of_the_connection(kind, Deed(made, {}, LASTS_S, Random(1)))
    eventually(lambda: works_again(made), "a load", 20.0)
    assert made.cache.status().boot == before


def test_an_engines_process_is_stopped_and_goes_on(made: Stage) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        deed = Deed(made, {"EngineCore": process.pid}, 0.1, Random(1))
        assert DEEDS["engine frozen"](deed) == "EngineCore"
        process.communicate(b"\n", timeout=10.0)
    assert process.returncode == 0


def test_a_server_that_ends_by_itself_is_counted_and_replaced(made: Stage) -> None:
    assert made.cache.process is not None
    made.cache.process.kill()
    made.cache.process.wait()
    made.revive()
    assert made.deaths == 1
    assert made.cache.answers(1_000)
    made.revive()
    assert made.deaths == 1
