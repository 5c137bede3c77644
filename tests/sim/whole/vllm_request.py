"""vLLM's requests, and what goes to its workers and comes back with each step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from sim.whole.truth import Prefix


class Status(Enum):
    WAITING = "waiting"
    LOADING = "waiting for remote kvs"
    PREEMPTED = "preempted"
    RUNNING = "running"
    FINISHED = "finished"


class Request:
    """`request_id` to `skip_reading_prefix_cache` is what the connector sees."""

    def __init__(self, request_id: str, prompt: Sequence[int], max_tokens: int, block_tokens: int) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = len(prompt)
        self.block_hashes: list[bytes] = []
        self.skip_reading_prefix_cache = False
        self.prefix = Prefix()
        self.max_tokens = max_tokens
        self.status = Status.WAITING
        self.computed = 0
        self.placeholders = 0
        self.in_flight = 0
        self.stale = 0
        self.drop_stale = False
        self.preemptions = 0
        self.last_step = 0
        self.is_prefill = True
        self._block_tokens = block_tokens
        self.append(prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.prefix)

    @property
    def output_count(self) -> int:
        return len(self.prefix) - self.num_prompt_tokens

    def append(self, tokens: Sequence[int]) -> None:
        self.prefix.extend(tokens)
        step = self._block_tokens
        while (len(self.block_hashes) + 1) * step <= len(self.prefix):
            self.block_hashes.append(self.prefix.digests[(len(self.block_hashes) + 1) * step - 1])


@dataclass(slots=True)
class Part:
    """What a step computes of one request."""

    request_id: str
    computed: int
    tokens: int
    outputs: int  # that the worker's copy of the request has, those in flight included
    tables: tuple[tuple[int, ...], ...]
    all_tokens: list[int] | None  # new to the workers


@dataclass(slots=True)
class Step:
    number: int
    parts: dict[str, Part] = field(default_factory=dict)
    preempted: set[str] = field(default_factory=set)
    finished: set[str] = field(default_factory=set)
    loads_first: bool = False  # some request needs a load before this step computes
    plan: object = None

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.parts.values())


@dataclass(slots=True)
class Results:
    """What all workers together say of a step."""

    sampled: dict[str, int] = field(default_factory=dict)
    loaded: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    bad_blocks: set[int] = field(default_factory=set)
    outcomes: list[object] = field(default_factory=list)


@dataclass(frozen=True)
class EngineSize:
    block_tokens: int
    blocks: int
    windows: tuple[int, ...]
    requests_max: int
    step_tokens: int
    part_tokens: int = 0  # of one request in a step; 0: all that fit
    depth: int = 1  # steps under way at a time
    local_cache: bool = True  # vLLM's own prefix cache
    placeholders: bool = False  # vLLM's async scheduling: decodes go on before the token before is known

    @property
    def request_tokens_max(self) -> int:
        return (self.blocks - 1) // len(self.windows) * self.block_tokens - 1
