"""Steady requests through outages of all kinds: none fails, is wrong or is stuck, and hits come again."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from e2e.faults import FAULTS
from e2e.kit import Plain, connector
from e2e.outages import Outcome, rig

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1800)]

PACE_S = 0.2
OPTIONS = connector(Path("none yet"))
# What is not loaded is computed, beside those that came meanwhile and beside a server that starts.  A request
# waits for the cache only where nobody answers: once, for a lookup's deadline; then the gate is shut.
COMPUTED_MS = 1_500
ADDED_MS_MAX = {False: COMPUTED_MS, True: COMPUTED_MS + OPTIONS["lookup_deadline_ms"]}
# A server that is back is asked within an interval, and one registration later it is used; then it takes some
# requests until one begins that can hit.
REGISTERED_S = 1.0
HITS_AGAIN_S_MAX = 1.1 * OPTIONS["heartbeat_interval_s"] + REGISTERED_S + 4 * PACE_S
PROCESSES = ("EngineCore", "Worker")

LOADS: dict[str, dict[str, object]] = {"before the step": {}, "beside the steps": {"sync_load_ms": 0.0}}
OF_COPIES = ["none", "killed in mid-load", "killed in mid-store"]
CHOSEN = [
    *(("before the step", name) for name in FAULTS),
    *(("beside the steps", name) for name in OF_COPIES),
]


@pytest.fixture(scope="module")
def outcomes(
    plain: Plain, model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Outcome]]:
    """Of all faults, one after the other, on one engine for each way to load."""

    @cache
    def of(loads: str) -> dict[str, Outcome]:
        folder = tmp_path_factory.mktemp("outages")
        options = {**OPTIONS, **LOADS[loads]}
        with rig(model("llama"), folder, options, pace_s=PACE_S, lasts_s=1.5, seed=1) as running:
            for name in (name for of, name in CHOSEN if of == loads):
                running.run(FAULTS[name])
            return {outcome.fault: outcome for outcome in running.outcomes(plain)}

    return of


@pytest.mark.parametrize(("loads", "name"), CHOSEN)
def test_an_outage_costs_hits_and_nothing_else(
    loads: str, name: str, outcomes: Callable[[str], dict[str, Outcome]]
) -> None:
    outcome, fault = outcomes(loads)[name], FAULTS[name]
    assert (outcome.failed, outcome.wrong, outcome.stuck) == (0, 0, 0), outcome
    assert outcome.tracebacks == 0, outcome
    assert outcome.worst_added_ms < ADDED_MS_MAX[fault.unanswered], outcome
    assert outcome.hits_again_s is not None, outcome
    assert outcome.hits_again_s < HITS_AGAIN_S_MAX, outcome
    for lines in (outcome.degraded, outcome.recovered):
        assert set(lines) <= set(PROCESSES), outcome
        assert all(lines.get(process, 0) in fault.told for process in PROCESSES), outcome
