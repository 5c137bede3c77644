"""What vLLM gives to a connector: its own KV cache, and as much of its config as is read."""

import math
from types import SimpleNamespace

import torch
from vllm.config import KVTransferConfig
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
)

BLOCK_TOKENS = 16
BLOCKS = 8
LAYERS = 2
HEAD = {"num_kv_heads": 2, "head_size": 8, "dtype": torch.bfloat16}


def full(block_tokens: int = BLOCK_TOKENS, **more: object) -> FullAttentionSpec:
    return FullAttentionSpec(block_size=block_tokens, **HEAD, **more)


def hf_config(**facts: object) -> SimpleNamespace:
    """What a model's config.json says, as transformers takes it."""
    return SimpleNamespace(to_dict=lambda: facts)


def vllm_config(**facts: object) -> SimpleNamespace:
    """`facts`: "section.name" without the dot: `model_revision`, `parallel_rank`."""
    sections: dict[str, dict[str, object]] = {
        "model": {
            "model": "some/model", "revision": None, "seed": 0, "dtype": torch.bfloat16, "quantization": None,
            "hf_config": hf_config(rope_parameters={"rope_theta": 1e4}), "max_model_len": 4096,
            "original_max_model_len": None,
        },
        "cache": {"cache_dtype": "auto", "prefix_caching_hash_algo": "sha256", "enable_prefix_caching": True},
        "parallel": {
            "rank": 0, "world_size": 1, "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1, "prefill_context_parallel_size": 1,
        },
        "load": {"load_format": "auto"},
        "attention": {"backend": None},
        "speculative": {"method": None, "draft_model_config": None},
    }  # fmt: skip
    for name, value in facts.items():
        section, _, key = name.partition("_")
        assert key in sections[section], name
        sections[section][key] = value
    configs = {f"{name}_config": SimpleNamespace(**section) for name, section in sections.items()}
    return SimpleNamespace(**configs, max_concurrent_batches=1, instance_id="1")


def with_connector(
    config: SimpleNamespace, engine_id: str | None = None, **options: object
) -> SimpleNamespace:
    config.kv_transfer_config = KVTransferConfig(
        kv_connector="LMConnector", kv_role="kv_both", engine_id=engine_id, kv_connector_extra_config=options
    )
    return config


def kv_config(*specs: KVCacheSpec, **more: object) -> KVCacheConfig:
    """A group for each spec."""
    groups = [KVCacheGroupSpec([f"layer {number}"], spec) for number, spec in enumerate(specs)]
    told = {"hash_block_size": math.gcd(*(spec.block_size for spec in specs)), **more}
    return KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups, **told)


def kv_caches(layout: str = "LB") -> tuple[KVCacheConfig, dict[str, torch.Tensor], torch.Tensor]:
    """One group's, and their bytes.  LB: each layer by itself; BL: a block's layers side by side."""
    spec = full()
    page = spec.page_size_bytes
    names = [f"layer {number}" for number in range(LAYERS)]
    size = LAYERS * BLOCKS * page
    strides = (BLOCKS * page, page) if layout == "LB" else (page, LAYERS * page)
    placed = KVCacheTensor(size, names, *strides)
    memory = torch.arange(size, dtype=torch.int64).to(torch.uint8)
    caches = {
        name: memory.as_strided((BLOCKS, page), (strides[1], 1), number * strides[0])
        for number, name in enumerate(names)
    }
    config = KVCacheConfig(
        num_blocks=BLOCKS, kv_cache_tensors=[placed], kv_cache_groups=[KVCacheGroupSpec(names, spec)]
    )
    return config, caches, memory
