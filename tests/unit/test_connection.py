"""What the doctor makes of a server's status."""

import msgspec
import pytest

from lmconnector.doctor.connection import ArenaFacts, Facts, WorkerFacts, engines, space
from lmconnector.doctor.findings import Verdict

MIB = 1 << 20


def arena(quarantined: int = 0, unpopulated: int = 0) -> ArenaFacts:
    return ArenaFacts(100 * MIB, 50 * MIB, (50 - quarantined) * MIB, quarantined * MIB, unpopulated * MIB)


def worker(engine: str = "engine", rank: int = 0, state: str = "ready", incomplete: str = "") -> WorkerFacts:
    return WorkerFacts(engine, "worker", rank, 2, state, incomplete)


def test_space_is_fine_also_when_none_is_free() -> None:
    full = ArenaFacts(100 * MIB, 0, 100 * MIB, 0)
    assert space(Facts(full)).verdict is Verdict.OK
    assert space(Facts(arena())).found == "100 MiB = 50 MiB free + 50 MiB used + 0 MiB quarantined"


def test_a_large_quarantine_is_a_warning() -> None:
    assert space(Facts(arena(quarantined=10))).verdict is Verdict.OK
    assert space(Facts(arena(quarantined=11))).verdict is Verdict.WARN


def test_memory_that_could_not_be_populated_is_a_warning_with_its_reason() -> None:
    finding = space(Facts(arena(unpopulated=20), population_failure="no space left on device"))
    assert finding.verdict is Verdict.WARN
    assert "no space left" in finding.found
    assert space(Facts(arena(unpopulated=20))).verdict is Verdict.OK


def test_engines_are_listed_with_their_processes() -> None:
    assert engines(Facts(arena())).found == "none is registered"
    finding = engines(Facts(arena(), (worker("a"), worker("a", 1), worker("b", state="warming"))))
    assert finding.verdict is Verdict.OK
    assert finding.found == "a: worker 0/2 ready, worker 1/2 ready; b: worker 0/2 warming"


def test_a_silent_worker_and_an_incomplete_engine_are_warnings() -> None:
    silent = engines(Facts(arena(), (worker(), worker(rank=1, state="silent"))))
    assert silent.verdict is Verdict.WARN
    assert "worker 1/2 silent" in silent.found
    incomplete = engines(Facts(arena(), (worker(incomplete="1 of 2 workers are registered"),)))
    assert incomplete.verdict is Verdict.WARN
    assert "1 of 2 workers" in incomplete.found


def test_a_status_may_tell_more_than_is_asked_but_not_less() -> None:
    told = {"arena": msgspec.to_builtins(arena()) | {"more": 1}, "more": [1], "worker_rows": []}
    assert msgspec.convert(told, Facts) == Facts(arena())
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"worker_rows": []}, Facts)
