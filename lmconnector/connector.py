"""`LMConnector`: what vLLM loads.  It takes vLLM's calls apart, and lets nothing of the cache's reach vLLM.

vLLM makes one instance in each worker and one beside its scheduler, and dies of any exception in a hook: so
every hook here ends in an answer, and an error is logged, counted, and a miss.
"""

from lmconnector.versions import refuse_unsupported_vllm

refuse_unsupported_vllm()  # before any of vLLM's names: another version may not have them

import logging
import os
from collections import Counter
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
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from lmconnector import bridge, config, hashes, layout, plugin
from lmconnector.bridge import HIT_SOURCE, OutcomeMetadata, PlanMetadata, PoolBlocks, guarded, scheduled
from lmconnector.client import Client
from lmconnector.errors import UnsupportedError
from lmconnector.geometry import ChunkLayout
from lmconnector.heartbeat import monotonic_ms
from lmconnector.link import ZmqLink
from lmconnector.membership import Member, registration
from lmconnector.metadata import Plan
from lmconnector.metrics import Meter, PromMetrics, Stats, prom_metrics
from lmconnector.pace import Pace
from lmconnector.scheduler import SchedulerSide
from lmconnector.stores import Surroundings
from lmconnector.transfer import new_transfer
from lmconnector.worker import Part, WorkerSide, without_an_arena

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

log = logging.getLogger(f"vllm.{__name__}")

PENDING_MS_MAX = 10_000  # vLLM is kept awake no longer for copies that do not end


class LMConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(
        self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig"
    ) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        self.errors: Counter[str] = Counter()
        self._options = config.parse(transfer.kv_connector_extra_config or {})
        self._chunks: ChunkLayout | None = None  # without one the cache is left out
        self._worker: WorkerSide | None = None
        self._scheduler: SchedulerSide | None = None
        self._member: Member | None = None
        self._meter: Meter | None = None
        self._blocks = PoolBlocks()
        self._begin(role)

    def _begin(self, role: KVConnectorRole) -> None:
        try:
            if role is KVConnectorRole.WORKER:  # whatever goes wrong here, it tells the loads as failed
                self._worker = without_an_arena()
            self._chunks = layout.chunk_layout(
                self._vllm_config, self._kv_cache_config, self._options.chunk_tokens
            )
            self._namespace = layout.namespace(self._vllm_config, self._kv_cache_config, self._chunks)
            if role is KVConnectorRole.SCHEDULER:
                self._begin_scheduler(self._chunks)
        except UnsupportedError as error:
            log.warning("connector: serving without the cache: %s", error)
        except Exception:  # a cache has no right to end the engine
            self._chunks = None
            log.exception("connector: serving without the cache: a bug, or a vLLM that it does not know")

    def _begin_scheduler(self, chunks: ChunkLayout) -> None:
        config.log_options(self._options)
        if reason := hashes.why_unstable(self._vllm_config.cache_config.prefix_caching_hash_algo, os.environ):
            log.warning("connector: %s", reason)
        transfer = self._vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy != "recompute":
            transfer.kv_load_failure_policy = "recompute"
            log.info(
                "connector: kv_load_failure_policy set to recompute: a failed load costs time, no request"
            )
        member = self._member = Member(self._options, self._registration(None))
        client = Client(ZmqLink(member.runtime_dir), monotonic_ms)
        around = Surroundings(
            self._options,
            chunks,
            client,
            member,
            self._blocks,
            workers=self._vllm_config.parallel_config.world_size,
            caches_locally=bool(self._vllm_config.cache_config.enable_prefix_caching),
            steps_overlap=self._vllm_config.max_concurrent_batches > 1,
            clock=monotonic_ms,
        )
        self._scheduler = SchedulerSide(around, Pace(layout.block_bytes(self._kv_cache_config)))
        self._meter = Meter("scheduler", member.heartbeat, monotonic_ms)

    def _registration(self, wire_layout: Any) -> Any:
        parallel = self._vllm_config.parallel_config
        engine, instance = self._kv_transfer_config.engine_id, self._vllm_config.instance_id
        size = parallel.world_size
        return registration(engine, parallel.rank, size, self._namespace, wire_layout, instance)

    @property
    def _cache_hit_source(self) -> Any:
        """Where vLLM's metrics say that the hits come from; 0.32 has names for it."""
        return HIT_SOURCE

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a store that is dropped is a later miss

    # The worker's side

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._role is not KVConnectorRole.WORKER or self._chunks is None:
            return
        try:
            self._begin_worker(kv_caches, self._chunks)
        except UnsupportedError as error:
            log.warning("connector: serving without the cache: %s", error)
        except Exception:  # a cache has no right to end the engine
            log.exception("connector: serving without the cache: a bug, or a vLLM that it does not know")

    def _begin_worker(self, kv_caches: dict[str, torch.Tensor], chunks: ChunkLayout) -> None:
        regions = layout.block_regions(self._kv_cache_config, kv_caches)
        wire = layout.wire_layout(self._vllm_config, self._kv_cache_config, chunks, regions, kv_caches)
        transfer = new_transfer(regions, chunks.groups)
        sizes = tuple(group.part_bytes for group in wire.groups)
        stores = layout.stores_its_part(self._vllm_config, self._kv_cache_config)
        member = Member(self._options, self._registration(wire), transfer)
        part = Part(wire.part, sizes, wire.block_bytes, stores)
        self._worker = WorkerSide(
            transfer, part, lambda: member.map, deadline_ms=self._options.request_deadline_ms
        )
        self._meter = Meter(f"worker {wire.tp_rank + wire.pp_rank * wire.tp}", member.heartbeat, monotonic_ms)
        self._member = member
        member.announce()

    @guarded(None)
    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """The first call after warm-up: from here on the server may count on our heartbeat."""
        if self._worker is not None and self._member is not None:
            self._member.heartbeat.ensure_started()
        return None

    @guarded(None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker is not None:
            self._worker.load(self._bound_plan())
        if self._member is not None:
            self._member.heartbeat.ensure_started()

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

    @guarded(lambda: PlanMetadata(Plan()))
    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        plan = self._scheduler.take_loads() if self._scheduler is not None else Plan()
        self._add_stores(plan, scheduler_output)
        return PlanMetadata(plan)

    @guarded(None)
    def _add_stores(self, plan: Plan, output: Any) -> None:
        if self._scheduler is None:
            return
        for request_id in output.preempted_req_ids or ():
            if request_id not in output.num_scheduled_tokens:  # else it has been taken up again already
                self._scheduler.on_preempted(request_id)
        self._scheduler.add_stores(plan, scheduled(output, self._scheduler.storing))

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
        """vLLM makes steps while this is true, also without a request: the end of a copy is told by one."""
        since_ms = monotonic_ms() - PENDING_MS_MAX
        return self._scheduler is not None and self._scheduler.jobs.begun_since(since_ms)

    @guarded(lambda: False)
    def reset_cache(self) -> bool | None:
        if self._scheduler is not None:
            return self._scheduler.reset()
        return True

    # Either's

    @guarded(None)
    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        counters = [side.counts for side in (self._worker, self._scheduler) if side is not None]
        return self._meter.take(self.errors, *counters) if self._meter is not None else None

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return Stats(data) if data is not None else None

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> PromMetrics | None:
        return prom_metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def shutdown(self) -> None:
        """Each by itself, and the member last: by its lock the server knows that we may still copy."""
        copies_ended = False
        with bridge.Shielded("shutdown"):
            copies_ended = self._worker is None or self._worker.close()
        with bridge.Shielded("shutdown"):
            if self._scheduler is not None:
                self._scheduler.close()
        with bridge.Shielded("shutdown"):
            if self._member is not None:
                self._member.close(copies_ended=copies_ended)


plugin.register()
