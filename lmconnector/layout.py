"""vLLM's KV cache -> regions of bytes, cache groups, and the namespace that tells whose bytes are alike.

A block id belongs to one cache group at a time, and the groups lie over the same bytes: so one block is the
same page in every region, whichever group owns it, and a part of a chunk is `blocks x pages` bytes.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from vllm.config import ModelConfig, SpeculativeConfig, VllmConfig
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from cache_server.protocol import messages as m
from lmconnector import hashes
from lmconnector.errors import UnsupportedError
from lmconnector.geometry import ChunkLayout, GroupLayout

FULL = (FullAttentionSpec, MLAAttentionSpec)
ORIGIN = ("transformers_version", "name_or_path")  # of a model's config, whatever it computes
# Words of configs.  Where a request may be longer than a model was made for, longrope, once named su, takes
# other factors for all tokens, and Llama 4 other attention temperatures.
LENGTH_DECIDES = ("longrope", '"su"', "llama4")
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def chunk_layout(vllm_config: VllmConfig, kv_config: KVCacheConfig, chunk_tokens: int) -> ChunkLayout:
    """Raises `UnsupportedError` for what can't be cached correctly."""
    check_parallelism(vllm_config)
    if not kv_config.kv_cache_groups:
        raise UnsupportedError("the model has no KV cache")
    specs = [_attention_of(group) for group in kv_config.kv_cache_groups]
    longest = max(spec.block_size for spec in specs)
    chunk_tokens = max(chunk_tokens, longest)
    hash_tokens = _hash_tokens(vllm_config, kv_config, specs)
    for spec in specs:
        if chunk_tokens % spec.block_size or chunk_tokens % hash_tokens:
            raise UnsupportedError(
                f"chunk_tokens = {chunk_tokens} is no multiple of the block size {spec.block_size} "
                f"and of the hash's {hash_tokens}: set another chunk_tokens"
            )
    return ChunkLayout(chunk_tokens, hash_tokens, tuple(_group(spec, chunk_tokens) for spec in specs))


def _hash_tokens(vllm_config: VllmConfig, kv_config: KVCacheConfig, specs: list[KVCacheSpec]) -> int:
    """Tokens per block hash; before 0.32 vLLM does not tell it, but resolves it like this."""
    told = getattr(kv_config, "hash_block_size", None)
    if told is None and len(specs) > 1:
        told = resolve_kv_cache_block_sizes(kv_config, vllm_config)[1]
    return int(told or specs[0].block_size)


def _replicas(kv_config: KVCacheConfig) -> int:
    """How many ranks hold the same bytes; vLLM 0.30 does not tell, and then each has a part of its own."""
    return max(1, int(getattr(kv_config, "kv_tp_replicas", 1)))


def check_parallelism(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if getattr(parallel, name, 1) > 1:
            raise UnsupportedError(
                f"{name} = {getattr(parallel, name)}: context parallelism is not supported"
            )


def check_kind(spec: KVCacheSpec) -> None:
    """Of one layer."""
    if type(spec) not in (*FULL, SlidingWindowSpec):
        raise UnsupportedError(f"KV cache of the kind {type(spec).__name__} is not supported")
    if getattr(spec, "non_causal", False):
        raise UnsupportedError(
            "attention that looks ahead is not supported: a prefix alone does not make its KV"
        )


def _attention_of(group: KVCacheGroupSpec) -> KVCacheSpec:
    spec = group.kv_cache_spec
    members = list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    for member in members:
        check_kind(member)
    if len(kinds := {type(member).__name__ for member in members}) > 1:
        raise UnsupportedError(
            f"KV caches of the kinds {', '.join(sorted(kinds))} in one group are not supported"
        )
    if group.host_resident or group.is_eagle_group:
        raise UnsupportedError("host-resident and draft-model KV cache groups are not supported")
    return members[0]


def _group(spec: KVCacheSpec, chunk_tokens: int) -> GroupLayout:
    window = 0
    if isinstance(spec, SlidingWindowSpec):
        blocks = -(-(spec.sliding_window - 1 + spec.extra_retained_tokens) // spec.block_size)
        window = max(1, -(-blocks * spec.block_size // chunk_tokens))
    return GroupLayout(spec.block_size, chunk_tokens // spec.block_size, window)


def block_regions(kv_config: KVCacheConfig, kv_caches: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Byte tensors [num_blocks, page bytes]: row b of all of them is block b."""
    blocks = kv_config.num_blocks
    regions: dict[tuple[int, int], torch.Tensor] = {}
    for placed in kv_config.kv_cache_tensors:
        name = next((name for name in placed.layers if name in kv_caches), None)
        if name is None:
            continue
        storage = kv_caches[name].untyped_storage()
        raw = torch.empty(0, dtype=torch.uint8, device=kv_caches[name].device).set_(storage)
        if placed.layer_stride >= blocks * placed.block_stride:  # each layer by itself
            span = raw[placed.offset : placed.offset + len(placed.layers) * placed.layer_stride]
            found = list(span.view(-1, blocks, placed.block_stride))
        else:  # all layers' pages of a block side by side
            found = [raw[: blocks * placed.block_stride].view(blocks, placed.block_stride)]
        for region in found:
            regions.setdefault((region.data_ptr(), region.stride(0)), region)
    if not regions:
        raise UnsupportedError("vLLM registered no KV cache tensor of this model")
    return list(regions.values())


def page_bytes(regions: list[torch.Tensor]) -> int:
    """Of one block, over all regions."""
    return sum(int(region.shape[1]) for region in regions)


def part_bytes(regions: list[torch.Tensor], group: GroupLayout) -> int:
    return group.blocks_per_chunk * page_bytes(regions)


def block_bytes(kv_config: KVCacheConfig) -> int:
    """Of one block on one rank, before there are tensors to ask."""
    # The tensors are places in one allocation, and each tells all of its size.
    size = max((placed.size for placed in kv_config.kv_cache_tensors), default=0)
    return int(size) // max(1, int(kv_config.num_blocks))


def stores_its_part(vllm_config: VllmConfig, kv_config: KVCacheConfig) -> bool:
    """Of the ranks that hold the same bytes the first one stores them."""
    return bool(vllm_config.parallel_config.rank % _replicas(kv_config) == 0)


def wire_layout(
    vllm_config: VllmConfig,
    kv_config: KVCacheConfig,
    chunks: ChunkLayout,
    regions: list[torch.Tensor],
    kv_caches: dict[str, torch.Tensor],
) -> m.Layout:
    parallel = vllm_config.parallel_config
    replicas = _replicas(kv_config)
    first = next(iter(kv_caches.values()))
    return m.Layout(
        groups=tuple(m.Group(part_bytes(regions, group), group.window) for group in chunks.groups),
        layers=tuple(
            m.Layer(name[-128:], tuple(cache.shape), tuple(cache.stride()), str(cache.dtype))
            for name, cache in kv_caches.items()
        ),
        device=str(first.device),
        dtype=str(first.dtype),
        block_tokens=chunks.groups[0].block_tokens,
        block_bytes=page_bytes(regions),
        chunk_tokens=chunks.chunk_tokens,
        part=parallel.rank // replicas,
        parts=parallel.world_size // replicas,
        tp=parallel.tensor_parallel_size,
        tp_rank=parallel.rank % parallel.tensor_parallel_size,
        pp=parallel.pipeline_parallel_size,
        pp_rank=parallel.rank // parallel.tensor_parallel_size,
    )


def namespace(vllm_config: VllmConfig, kv_config: KVCacheConfig, chunks: ChunkLayout) -> bytes:
    """Digest of all that makes KV bytes interchangeable and vLLM's block hash does not cover."""
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    load_format = str(vllm_config.load_config.load_format)
    config = _plain(model.hf_config.to_dict())
    facts = {
        "model": model.model,
        "revision": model.revision,
        "commit": _commit(model.model, model.revision),
        "weights": _weights_id(Path(model.model)),
        "config": config,
        "lengths": _lengths(model, json.dumps(config)),
        "load_format": load_format,
        "dummy_seed": model.seed if load_format.endswith("dummy") else None,
        "draft": _draft(vllm_config.speculative_config),
        "attention": str(vllm_config.attention_config.backend),  # one may pack what another does not
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "cache_dtype": cache.cache_dtype,
        "hash_algorithm": cache.prefix_caching_hash_algo,
        "hash_seed": hashes.seed(cache.prefix_caching_hash_algo, os.environ),
        "layout": kv_config.kv_cache_layout,
        "chunks": [chunks.chunk_tokens, chunks.hash_tokens],
        "groups": [
            [type(group.kv_cache_spec).__name__, group.kv_cache_spec.block_size, len(group.layer_names)]
            for group in kv_config.kv_cache_groups
        ],
        "parallel": [parallel.tensor_parallel_size, parallel.pipeline_parallel_size],
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=32).digest()


def _plain(value: object) -> object:
    """What a model computes, by its config as vLLM has it, overrides and all.  It has to come out alike in
    every process: so without what tells where it came from, and without addresses of objects."""
    match value:
        case dict():
            kept = ((str(key), part) for key, part in value.items())
            return {key: _plain(part) for key, part in kept if not key.startswith("_") and key not in ORIGIN}
        case list() | tuple():
            return [_plain(part) for part in value]
        case set() | frozenset():
            return sorted(str(part) for part in value)
        case None | str() | int() | float():
            return value
        case torch.dtype():
            return str(value)
        case _:
            return type(value).__name__


def _lengths(model: ModelConfig, config: str) -> list[object] | None:
    """Where the longest request that is allowed decides how also a short one is computed."""
    if not any(word in config for word in LENGTH_DECIDES):
        return None
    return [getattr(model, "original_max_model_len", None), model.max_model_len]


def _commit(model: str, revision: str | None) -> str | None:
    """Which files a hub's branch stood for when they came.  None: a folder, or nobody can tell."""
    if Path(model).is_dir():
        return None
    with contextlib.suppress(ValueError):  # not the name of a hub's model
        found = try_to_load_from_cache(model, "config.json", revision=revision)
        if isinstance(found, str):
            return Path(found).parent.name
    return None


def _draft(speculative: SpeculativeConfig | None) -> list[object]:
    """Another one has other layers of its own in the same cache."""
    if speculative is None or speculative.draft_model_config is None:
        return []
    draft = speculative.draft_model_config
    return [speculative.method, draft.model, draft.revision, _weights_id(Path(draft.model))]


def _weights_id(folder: Path) -> list[list[object]]:
    """Other weights under the same path are another model; a model of a hub is told by its commit."""
    if not folder.is_dir():
        return []
    files = sorted({file for pattern in WEIGHT_FILES for file in folder.glob(pattern)})
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
