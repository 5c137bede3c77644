"""`LMConnector`: what vLLM loads.  It takes vLLM's calls apart, and lets nothing of the cache's reach vLLM.

vLLM makes one instance in each worker and one beside its scheduler, and dies of any exception in a hook: so
every hook here ends in an answer, and an error is logged, counted, and a miss.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from lmconnector import config, layout
from lmconnector.client import Client
from lmconnector.errors import UnsupportedError
from lmconnector.heartbeat import monotonic_ms
from lmconnector.link import ZmqLink
from lmconnector.membership import Member, registration
from lmconnector.metadata import Outcome, Plan
from lmconnector.scheduler import SchedulerSide
from lmconnector.stores import Surroundings
from lmconnector.transfer import CpuTransfer
from lmconnector.worker import WorkerSide

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(f"vllm.{__name__}")


@dataclass
class PlanMetadata(KVConnectorMetadata):
    plan: Plan


@dataclass
class OutcomeMetadata(KVConnectorWorkerMetadata):
    outcome: Outcome

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "OutcomeMetadata":
        assert isinstance(other, OutcomeMetadata), "all ranks run this connector"
        return OutcomeMetadata(self.outcome.merged(other.outcome))


def guarded(default: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """vLLM dies of an exception in a hook; this one answers with a miss instead."""

    def wrap(hook: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(hook)
        def total(self: "LMConnector", *args: Any, **kwargs: Any) -> Any:
            try:
                return hook(self, *args, **kwargs)
            except Exception:  # a cache has no right to end the engine
                self.errors += 1
                if self.errors <= ERRORS_LOGGED_MAX:
                    log.exception(
                        "hook: %s failed, the cache is left out (%d so far)", hook.__name__, self.errors
                    )
                return default() if callable(default) else default

        return total

    return wrap


ERRORS_LOGGED_MAX = 20


class PoolBlocks:
    """Blocks of vLLM's pool, held by their reference count."""

    def __init__(self) -> None:
        self.pool: Any = None

    def hold(self, blocks: Sequence[int]) -> None:
        self.pool.touch([self.pool.blocks[block] for block in blocks])

    def let_go(self, blocks: Sequence[int]) -> None:
        self.pool.free_blocks([self.pool.blocks[block] for block in blocks])


class LMConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self.errors = 0
        self._options = config.parse(transfer.kv_connector_extra_config or {})
        self._worker: WorkerSide | None = None
        self._scheduler: SchedulerSide | None = None
        self._member: Member | None = None
        self._blocks = PoolBlocks()
        self._plan: Plan | None = None
        try:
            self._chunks = layout.chunk_layout(vllm_config, kv_cache_config, self._options.chunk_tokens)
        except UnsupportedError as error:
            log.warning("connector: serving without the cache: %s", error)
            return
        self._namespace = layout.namespace(vllm_config, kv_cache_config, self._chunks)
        if role is KVConnectorRole.SCHEDULER:
            config.log_options(self._options)
            if transfer.kv_load_failure_policy != "recompute":
                transfer.kv_load_failure_policy = "recompute"
                log.info(
                    "connector: kv_load_failure_policy set to recompute: a failed load costs time, no request"
                )
            self._member = self._new_member(None)
            self._scheduler = self._new_scheduler(self._member)

    def _new_member(self, wire_layout: Any) -> Member:
        parallel = self._vllm_config.parallel_config
        return Member(
            self._options,
            registration(
                self._kv_transfer_config.engine_id,
                parallel.rank,
                parallel.world_size,
                self._namespace,
                wire_layout,
            ),
        )

    def _new_scheduler(self, member: Member) -> SchedulerSide:
        client = Client(ZmqLink(member.runtime_dir), monotonic_ms)
        world = self._vllm_config.parallel_config.world_size
        around = Surroundings(self._options, self._chunks, client, member, self._blocks, world)
        return SchedulerSide(around, monotonic_ms)

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a store that is dropped is a later miss

    # The worker's side

    @guarded(None)
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._role is not KVConnectorRole.WORKER or not hasattr(self, "_namespace"):
            return
        regions = layout.block_regions(self._kv_cache_config, kv_caches)
        wire = layout.wire_layout(self._vllm_config, self._kv_cache_config, self._chunks, regions, kv_caches)
        sizes = [group.part_bytes for group in wire.groups]
        member = self._member = self._new_member(wire)
        transfer = CpuTransfer(regions, self._chunks.groups)
        self._worker = WorkerSide(transfer, sizes, wire.part, lambda: member.map)

    @guarded(None)
    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """The first call after warm-up: from here on the server may count on our heartbeat."""
        if self._worker is not None and self._member is not None:
            self._member.heartbeat.ensure_started()
        return None

    @guarded(None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None and self._member is not None:
            self._member.heartbeat.ensure_started()
            self._worker.load(self._bound_plan())

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None: ...

    @guarded(None)
    def wait_for_save(self) -> None:
        if self._worker is not None:
            self._worker.store(self._bound_plan())

    @guarded(KVConnectorTransferResults)
    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        if self._worker is None:
            return KVConnectorTransferResults()
        ended, failed = self._worker.take_finished_loads()
        return KVConnectorTransferResults(finished_recving=ended, failed_recving=failed)

    @guarded(set)
    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_bad_blocks() if self._worker is not None else set()

    @guarded(None)
    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        outcome = self._worker.take_outcome() if self._worker is not None else None
        return OutcomeMetadata(outcome) if outcome else None

    def _bound_plan(self) -> Plan:
        metadata = self._connector_metadata
        return metadata.plan if isinstance(metadata, PlanMetadata) else Plan()

    # The scheduler's side

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        self._blocks.pool = gpu_block_pool

    @guarded(None)
    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """All workers have warmed up: the first request shall find a server that knows us."""
        if self._scheduler is not None and self._member is not None:
            self._member.heartbeat.ensure_started()

    @guarded(None)
    def on_new_request(self, request: Any) -> None:
        if self._scheduler is not None and self._member is not None:
            self._member.heartbeat.ensure_started()
            self._scheduler.on_new_request(request)

    @guarded(lambda: (0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        if self._scheduler is None:
            return 0, False
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    @guarded(None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler is not None:
            self._scheduler.on_allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        plan = self._scheduler.take_loads() if self._scheduler is not None else Plan()
        self._add_stores(plan, scheduler_output)
        return PlanMetadata(plan)

    @guarded(None)
    def _add_stores(self, plan: Plan, output: Any) -> None:
        if self._scheduler is None:
            return
        for request_id in output.preempted_req_ids or ():
            self._scheduler.on_preempted(request_id)
        self._scheduler.add_stores(plan, _scheduled(output))

    @guarded(None)
    def update_connector_output(self, connector_output: Any) -> None:
        metadata = connector_output.kv_connector_worker_meta
        if self._scheduler is not None and isinstance(metadata, OutcomeMetadata):
            self._scheduler.on_outcome(metadata.outcome)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    @guarded(lambda: (False, None))
    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._scheduler is not None:
            self._scheduler.on_finished(request.request_id)
        return False, None

    @guarded(lambda: False)
    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.stores.under_way

    @guarded(lambda: False)
    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            self._scheduler.reset()
        return True

    @guarded(None)
    def shutdown(self) -> None:
        for side in (self._worker, self._scheduler, self._member):
            if side is not None:
                side.close()


def _scheduled(output: Any) -> Iterable[tuple[str, int, Callable[[], Sequence[Sequence[int]]]]]:
    state = output.kv_connector_block_state
    cached = output.scheduled_cached_reqs
    computed = [(new.req_id, new.num_computed_tokens) for new in output.scheduled_new_reqs]
    computed += zip(cached.req_ids, cached.num_computed_tokens, strict=True)
    for request_id, tokens in computed:
        tables = functools.partial(state.get_block_ids, request_id)
        yield request_id, tokens + output.num_scheduled_tokens[request_id], tables
