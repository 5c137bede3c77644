"""vLLM's objects and ours: what crosses between its two connectors, its blocks, its hooks."""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from lmconnector.metadata import Outcome, Plan

try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource
except ImportError:  # before 0.32 it was not asked for
    HIT_SOURCE = None
else:
    HIT_SOURCE = CacheHitSource.HOST

log = logging.getLogger(f"vllm.{__name__}")

ERRORS_LOGGED_MAX = 20  # per hook


@dataclass
class PlanMetadata(KVConnectorMetadata):
    plan: Plan


@dataclass
class OutcomeMetadata(KVConnectorWorkerMetadata):
    outcome: Outcome

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "OutcomeMetadata":
        with Shielded("aggregate"):
            assert isinstance(other, OutcomeMetadata), "all ranks run this connector"
            return OutcomeMetadata(self.outcome.merged(other.outcome))
        return self


class PoolBlocks:
    """Blocks of vLLM's pool, held by their reference count, found by their hash."""

    def __init__(self) -> None:
        self.pool: Any = None

    def hold(self, blocks: Sequence[int]) -> None:
        self.pool.touch([self.pool.blocks[block] for block in blocks])

    def let_go(self, blocks: Sequence[int]) -> None:
        self.pool.free_blocks([self.pool.blocks[block] for block in blocks])

    def forget(self, blocks: Sequence[int]) -> None:
        self.pool.evict_blocks(set(blocks))


class Guarded(Protocol):
    errors: Counter[str]


_told: Counter[str] = Counter()  # hooks whose errors were logged


def _tell(hook: str, error: Exception) -> None:
    _told[hook] += 1
    if _told[hook] <= ERRORS_LOGGED_MAX:
        log.error("hook: %s failed, the cache is left out", hook, exc_info=error)


def guarded(default: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """vLLM dies of an exception in a hook; this one answers with a miss instead."""

    def wrap(hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def total(self: Guarded, *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception as error:  # noqa: BLE001  a cache has no right to end the engine
                self.errors[f"hook_errors/{hook.__name__}"] += 1
                _tell(hook.__name__, error)
                return default() if callable(default) else default

        return total

    return wrap


class Shielded:
    """Around a hook of what is no connector, and can't count: what follows is its answer after an error."""

    def __init__(self, hook: str) -> None:
        self._hook = hook

    def __enter__(self) -> None: ...

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if not isinstance(error, Exception):
            return False
        _tell(self._hook, error)
        return True


def scheduled(
    output: Any, wanted: Mapping[str, object]
) -> Iterable[tuple[str, int, Callable[[], Sequence[Sequence[int]]]]]:
    """What the step computes of the `wanted` requests.  Most steps decode many, and nothing of them is."""
    if not wanted:
        return
    cached = output.scheduled_cached_reqs
    new = [(each.req_id, each.num_computed_tokens) for each in output.scheduled_new_reqs]
    for request_id, tokens in chain(new, zip(cached.req_ids, cached.num_computed_tokens, strict=True)):
        if request_id in wanted:
            tables = functools.partial(output.kv_connector_block_state.get_block_ids, request_id)
            yield request_id, tokens + output.num_scheduled_tokens[request_id], tables
