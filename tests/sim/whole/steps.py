"""One step on all workers, and what they say of it together."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lmconnector.metadata import Plan
from sim.whole.vllm_request import Results, Step

if TYPE_CHECKING:
    from sim.whole.engine import Engine


class Aggregator:
    """vLLM's: a load is over when every rank has said so (kv_connector/utils.py)."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks
        self._left: dict[str, int] = {}
        self._failed: set[str] = set()

    def take(self, said: Sequence[tuple[set[str], set[str]]], results: Results) -> None:
        for ended, failed in said:
            for request_id in sorted(ended):
                self._left[request_id] = self._left.get(request_id, self._ranks) - 1
                if not self._left[request_id]:
                    del self._left[request_id]
                    results.loaded.append(request_id)
            self._failed |= failed
        results.failed = [request_id for request_id in results.loaded if request_id in self._failed]
        self._failed -= set(results.failed)


class StepRun:
    """One step on all workers: loads, the forward pass of all ranks together, stores, reports."""

    def __init__(
        self, engine: "Engine", step: Step, aggregator: Aggregator, on_end: Callable[[Step, Results], None]
    ) -> None:
        self._engine = engine
        self._step = step
        self._aggregator = aggregator
        self._on_end = on_end
        self._results = Results()
        self._said: list[tuple[set[str], set[str]]] = []
        assert isinstance(step.plan, Plan)
        self._plan = step.plan

    def begin(self) -> None:
        if self._step.loads_first:
            self._each(self._load, self._forward)
        else:
            self._forward()

    def _each(self, what: Callable[[int], None], then: Callable[[], None]) -> None:
        """Every rank in its own time; then all of them together."""
        engine = self._engine
        ranks = list(range(engine.model.ranks))
        engine.rng.shuffle(ranks)

        def one() -> None:
            what(ranks.pop())
            if not ranks:
                then()
            elif engine.drift_ms_max:
                engine.time.after(engine.rng.randint(0, engine.drift_ms_max), next_one)
            else:
                next_one()

        def next_one() -> None:
            engine.rank_processes[ranks[-1]].run(one)

        next_one()

    def _load(self, rank: int) -> None:
        self._engine.workers[rank].load(self._plan)

    def _forward(self) -> None:
        engine = self._engine
        engine.time.after(engine.rng.randint(0, engine.step_ms_max), self._compute)

    def _compute(self) -> None:
        engine = self._engine
        if any(process.is_dead for process in engine.rank_processes):
            return
        if self._step.loads_first:
            for rank in engine.ranks:  # the pass waits for the loads that it needs
                rank.transfer.finish_loads()
        self._results.sampled = engine.runner.forward(self._step)
        engine.time.after(
            engine.rng.randint(0, engine.step_ms_max), lambda: self._each(self._end, self._told)
        )

    def _end(self, rank: int) -> None:
        worker = self._engine.workers[rank]
        if not self._step.loads_first:
            worker.load(self._plan)
        worker.store(self._plan)
        self._said.append(worker.take_finished_loads())
        self._results.bad_blocks |= worker.take_bad_blocks()
        outcome = worker.take_outcome()
        if outcome:
            self._results.outcomes.append(outcome)

    def _told(self) -> None:
        self._aggregator.take(self._said, self._results)
        self._on_end(self._step, self._results)
