"""vLLM's own scheduler with both our sides: who shares blocks while another request loads them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from vllm.config import CacheConfig, KVTransferConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from engine_side import BLOCK_TOKENS, BLOCKS, Engine
from lmconnector.bridge import OutcomeMetadata
from processes import short_dir

pytestmark = pytest.mark.e2e

SHARED = list(range(100, 164))


class Both:
    """A real scheduler with `engine` as its connector's sides, and a model that notes what it reads."""

    def __init__(self, model: Path, arena: Path, nobody: Path, *, step_tokens: int, part_tokens: int) -> None:
        self.engine = Engine(arena, sync_load_ms=1_000)
        kv_config = _kv_config()
        config = VllmConfig(
            model_config=ModelConfig(model=str(model), skip_tokenizer_init=True, max_model_len=1_024),
            cache_config=CacheConfig(block_size=BLOCK_TOKENS, enable_prefix_caching=True),
            scheduler_config=SchedulerConfig(
                max_num_seqs=8, max_num_batched_tokens=step_tokens, max_model_len=1_024,
                enable_chunked_prefill=True, is_encoder_decoder=False, async_scheduling=False,
                long_prefill_token_threshold=part_tokens,
            ),
            kv_transfer_config=KVTransferConfig(
                kv_connector="LMConnector", kv_connector_module_path="lmconnector.connector",
                kv_role="kv_both", kv_load_failure_policy="recompute",
                kv_connector_extra_config={"dir": str(nobody)},
            ),
        )  # fmt: skip
        config.cache_config.num_gpu_blocks = BLOCKS
        self.scheduler = Scheduler(
            config, kv_config, StructuredOutputManager(config), block_size=BLOCK_TOKENS,
            hash_block_size=BLOCK_TOKENS, log_stats=False,
        )  # fmt: skip
        connector = self.scheduler.connector
        self.engine.scheduler._blocks = self.engine.scheduler.stores._blocks = connector._blocks
        connector._scheduler.close()
        connector._scheduler, connector._meter = self.engine.scheduler, None  # nobody takes the counts away
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_TOKENS, sha256)
        self.filled: set[int] = set()  # blocks in which something was computed or loaded

    def add(self, name: str, tokens: list[int]) -> Request:
        request = Request(
            name, tokens, SamplingParams(max_tokens=4, ignore_eos=True), None, block_hasher=self._hasher
        )
        self.scheduler.add_request(request)
        return request

    def step(self, *, loads_fail: bool = False) -> None:
        output = self.scheduler.schedule()
        plan = output.kv_connector_metadata.plan
        parts = {
            name: (self.scheduler.requests[name].num_computed_tokens - count, count)
            for name, count in output.num_scheduled_tokens.items()
        }
        if not loads_fail:
            self.filled.update(block for load in plan.loads for block in load.blocks)
        self._compute(parts, known=self.filled | {block for load in plan.loads for block in load.blocks})
        arena = self.engine.arena
        if loads_fail:
            self.engine.arena = None
        ended, failed, bad, outcome = self.engine.work(plan)
        self.engine.arena = arena
        names = list(parts)
        complete = [
            self.scheduler.requests[name].num_computed_tokens >= self.scheduler.requests[name].num_tokens
            for name in names
        ]
        self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: at for at, name in enumerate(names)},
                sampled_token_ids=[[7] if each else [] for each in complete],
                kv_connector_output=KVConnectorOutput(
                    finished_recving=ended or None, failed_recving=failed, invalid_block_ids=bad,
                    kv_connector_worker_meta=OutcomeMetadata(outcome) if outcome else None,
                ),
            ),
        )  # fmt: skip

    def _compute(self, parts: dict[str, tuple[int, int]], known: set[int]) -> None:
        """What a request computes is right if all before it is there; of a step's requests in any order."""
        for name, (first, count) in parts.items():
            blocks = self.scheduler.kv_cache_manager.get_block_ids(name)[0]
            lacking = [block for block in blocks[: first // BLOCK_TOKENS] if block not in known]
            assert not lacking, f"{name} is computed from blocks {lacking}, in which there is nothing"
            self.filled.update(blocks[first // BLOCK_TOKENS : (first + count) // BLOCK_TOKENS])

    def run(self) -> None:
        while self.scheduler.has_unfinished_requests():
            self.step()
        self.step()

    def forget(self) -> None:
        """Its blocks are others' now, and hold theirs."""
        assert self.scheduler.reset_prefix_cache()
        self.filled.clear()


def _kv_config() -> KVCacheConfig:
    spec = FullAttentionSpec(block_size=BLOCK_TOKENS, num_kv_heads=4, head_size=16, dtype=torch.bfloat16)
    groups = [KVCacheGroupSpec(["layer"], spec)]
    return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.fixture(params=[(28, 0), (64, 16)], ids=["in whole", "in parts"])
def both(request: pytest.FixtureRequest, model, tmp_path: Path) -> Iterator[Both]:
    step_tokens, part_tokens = request.param
    with short_dir() as nobody:
        made = Both(
            model("llama"), tmp_path / "arena", nobody, step_tokens=step_tokens, part_tokens=part_tokens
        )
        made.add("stores", SHARED + [5] * 8)
        made.run()
        assert made.engine.scheduler.counts["chunks_stored"] >= 2
        made.forget()
        yield made
        made.scheduler.connector.shutdown()


@pytest.mark.parametrize("aborted", [False, True])
def test_who_shares_a_load_that_fails_is_computed_from_what_is_there(both: Both, aborted: bool) -> None:
    loads, shares = both.add("loads", SHARED + [6] * 8), both.add("shares", SHARED + [8] * 60)
    both.step(loads_fail=True)
    assert both.engine.scheduler.counts["drops/load_failed"] == 1
    assert loads.num_computed_tokens == 0
    if aborted:
        both.scheduler.finish_requests("loads", RequestStatus.FINISHED_ABORTED)
    both.run()
    assert shares.is_finished()
    assert both.engine.scheduler.counts["hit_tokens"] > len(SHARED), "and once more, which has gone well"


def test_who_shares_a_load_that_succeeds_hits_locally(both: Both) -> None:
    both.add("loads", SHARED + [6] * 8)
    shares = both.add("shares", SHARED + [8] * 60)
    both.step()
    both.run()
    assert shares.is_finished()
    assert both.engine.scheduler.counts["loads"] == 1, "of the two"
