"""What was seen in a campaign, as plain values; `report.json` has them all.  Pure.

Times are seconds since the traffic began.
"""

from collections.abc import Sequence
from enum import Enum

from msgspec import Struct

from chaos.campaign.plan import Step
from lmconnector.demo.timeline import Change, overall


class Outcome(Enum):
    RIGHT = "right"
    WRONG = "wrong"  # tokens that the reference run has not
    FAILED = "failed"
    LEFT = "left"  # its client hung up, as planned; what it got was right


class Request(Struct, frozen=True, kw_only=True):
    at_s: float
    took_s: float
    first_token_s: float
    prompt_tokens: int
    answer_tokens: int  # that were asked for
    cached_tokens: int
    outcome: Outcome
    same_logprobs: bool = True
    error: str = ""

    @property
    def end_s(self) -> float:
        return self.at_s + self.took_s

    @property
    def hit(self) -> bool:
        return self.cached_tokens > 0


class Played(Struct, frozen=True, kw_only=True):
    """A step that was made."""

    step: Step
    began_s: float
    healed_s: float
    hit_s: float | None  # when the first request began that was a hit again
    note: str = ""  # what was chosen

    @property
    def end_s(self) -> float:
        return self.healed_s if self.hit_s is None else self.hit_s


class Sample(Struct, frozen=True, kw_only=True):
    """What one process holds, at a moment without a fault."""

    at_s: float
    process: str
    pid: int
    files: int
    threads: int
    shared: int  # mappings of files in memory, deleted ones too
    rss_mib: float


class End(Struct, frozen=True, kw_only=True):
    """When all is over and the engine is idle."""

    leases: int
    quarantined_bytes: int
    unaccounted_bytes: int
    locks: int  # files of processes, beside those of the engine's own
    files: tuple[str, ...]  # left where the arena lies, beside it
    hook_errors: float
    tracebacks: int
    server_errors: int
    server_deaths: int  # by itself


class Seen(Struct, frozen=True, kw_only=True):
    seed: int
    seconds: float
    requests: Sequence[Request]
    played: Sequence[Played]
    changes: Sequence[Change]
    samples: Sequence[Sample]
    end: End
    not_run: tuple[str, ...] = ()

    def states(self) -> list[tuple[float, str, str]]:
        """(when, state, why) of the engine, whose state is that of its worst process."""
        return overall(self.changes)
