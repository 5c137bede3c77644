"""What was seen in a run, as plain values; `out/demo.json` is this file filled in.  Pure.

Times are seconds since the first request.
"""

from collections.abc import Iterable, Sequence
from enum import Enum
from statistics import median

from msgspec import Struct

# The worst first: the engine's state is that of its worst process.
STATES = ("stopped", "degraded", "suspect", "recovering", "dormant", "healthy")


class Phase(Enum):
    """Of the cache server, when a request began."""

    ABSENT = "absent"
    UP = "up"
    AT_KILL = "killed while the request ran"
    DEAD = "dead"
    BACK = "restarted"


class Request(Struct, frozen=True, kw_only=True):
    document: int
    start_s: float
    end_s: float
    ttft_ms: float = 0.0  # until the first token
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: tuple[int, ...] = ()
    error: str = ""

    @property
    def hit(self) -> bool:
        return self.cached_tokens > 0


class Change(Struct, frozen=True):
    """One line of the engine's log; `process`: whose."""

    at_s: float
    process: str
    state: str
    why: str


class Span(Struct, frozen=True):
    start_s: float
    end_s: float
    state: str
    why: str


class Marks(Struct, kw_only=True):
    started_s: float | None = None
    killed_s: float | None = None
    restarted_s: float | None = None


class Run(Struct, kw_only=True):
    machine: str
    documents: int
    document_tokens: int
    chunk_tokens: int
    answer_tokens: int
    marks: Marks
    requests: list[Request]
    changes: list[Change]
    restored_chunks: int = 0  # found by the restarted server
    took_s: float = 0.0  # the whole demo, from the making of its model on
    unfinished: str = ""  # why the run was cut short

    @property
    def end_s(self) -> float:
        marks = (self.marks.started_s, self.marks.killed_s, self.marks.restarted_s)
        return max(
            [
                0.0,
                *(request.end_s for request in self.requests),
                *(change.at_s for change in self.changes),
                *(at_s for at_s in marks if at_s is not None),
            ]
        )

    def phase(self, request: Request) -> Phase:
        marks, start_s = self.marks, request.start_s
        if marks.killed_s is not None and start_s <= marks.killed_s < request.end_s:
            return Phase.AT_KILL
        began = [
            (marks.restarted_s, Phase.BACK),
            (marks.killed_s, Phase.DEAD),
            (marks.started_s, Phase.UP),
        ]
        return next((phase for at_s, phase in began if at_s is not None and start_s >= at_s), Phase.ABSENT)

    def answered(self, phases: Iterable[Phase], *, hit: bool | None = None) -> list[Request]:
        wanted = set(phases)
        return [
            request
            for request in self.requests
            if not request.error and self.phase(request) in wanted and hit in (None, request.hit)
        ]

    def references(self) -> dict[int, tuple[int, ...]]:
        """Each document's first answer, from before there was a cache server."""
        found: dict[int, tuple[int, ...]] = {}
        for request in self.answered([Phase.ABSENT]):
            if not request.hit and request.end_s < (self.marks.started_s or self.end_s + 1):
                found.setdefault(request.document, request.tokens)
        return found

    def spans(self) -> list[Span]:
        """The engine's health from the first request to the end."""
        spans: list[Span] = []
        for at_s, state, why in [*overall(self.changes), (self.end_s, "", "")]:
            start_s = max(0.0, at_s)
            if spans:
                last = spans.pop()
                if start_s > last.start_s:
                    spans.append(Span(last.start_s, start_s, last.state, last.why))
            if state:
                spans.append(Span(start_s, start_s, state, why))
        return spans

    def first(self, state: str, after_s: float, before_s: float | None = None) -> float | None:
        """When the engine first became that."""
        until_s = self.end_s if before_s is None else before_s
        return next(
            (at_s for at_s, new, _ in overall(self.changes) if new == state and after_s <= at_s <= until_s),
            None,
        )


def overall(changes: Sequence[Change]) -> list[tuple[float, str, str]]:
    """(when, state, why) of the engine as a whole: that of its worst process."""
    states: dict[str, str] = {}
    found: list[tuple[float, str, str]] = []
    for change in changes:
        states[change.process] = change.state
        worst = min(states.values(), key=STATES.index)
        if not found or found[-1][1] != worst:
            found.append((change.at_s, worst, change.why))
    return found


def typical_ms(requests: Sequence[Request]) -> float:
    return median([request.ttft_ms for request in requests] or [0.0])


def worst_ms(requests: Sequence[Request]) -> float:
    return max((request.ttft_ms for request in requests), default=0.0)
