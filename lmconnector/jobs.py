"""The copies in the workers' hands: each ends once, when every worker has said what became of it.  Pure."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from itertools import count

from lmconnector.metadata import Outcome


class Kind(Enum):
    LOAD = "load"  # before the forward pass of its step
    LOAD_BESIDE = "load beside the steps"
    STORE = "store"


@dataclass(slots=True)
class Job:
    kind: Kind
    on_end: Callable[[bool], None]  # whether all workers did it
    workers_left: int
    begun_ms: int
    failed: bool = False


class Jobs:
    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._numbers = count(1)
        self._jobs: dict[int, Job] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def begin(self, kind: Kind, now_ms: int, on_end: Callable[[bool], None]) -> int:
        """-> its number; `on_end` is called exactly once."""
        number = next(self._numbers)
        self._jobs[number] = Job(kind, on_end, self._workers, now_ms)
        return number

    def take(self, outcome: Outcome) -> None:
        """In the order in which they were begun: a chunk's parent is stored before it."""
        strange = (outcome.ended.keys() | outcome.failed) - self._jobs.keys()
        self._fail(outcome.failed - strange)
        with ExitStack() as all_told:  # an error of one is no reason not to tell the others
            for number in sorted(outcome.ended.keys() - strange, reverse=True):
                job = self._jobs[number]
                job.workers_left -= outcome.ended[number]
                assert job.workers_left >= 0, f"job {number} was ended more often than there are workers"
                if not job.workers_left:
                    del self._jobs[number]
                    all_told.callback(job.on_end, not job.failed)
        assert not strange, f"jobs {sorted(strange)} were never begun, or are over"

    def begun_since(self, ms: int) -> bool:
        """Whether one that is not over was begun after that time."""
        return any(job.begun_ms > ms for job in self._jobs.values())

    def _fail(self, numbers: set[int]) -> None:
        for number in numbers:
            self._jobs[number].failed = True
        if any(self._jobs[number].kind is Kind.LOAD for number in numbers):
            # What is under way may have been computed from what was not there.
            for job in self._jobs.values():
                job.failed |= job.kind is Kind.STORE
