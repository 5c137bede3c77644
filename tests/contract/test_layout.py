"""vLLM's kinds of KV cache: what is refused and why, whose bytes are alike, and where they lie."""

import dataclasses
import importlib
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip(
    "vllm", reason="the engine is not installed: `make setup` brings it", exc_type=ImportError
)

with warnings.catch_warnings():  # of its own deprecations, while it is imported
    warnings.simplefilter("ignore")
    importlib.import_module("lmconnector.connector")
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        CrossAttentionSpec,
        EncoderOnlyAttentionSpec,
        KVCacheSpec,
        MambaSpec,
        MLAAttentionSpec,
        SlidingWindowSpec,
        UniformTypeKVCacheSpecs,
    )

from lmconnector import layout
from lmconnector.errors import UnsupportedError
from vllm_side import BLOCK_TOKENS, BLOCKS, HEAD, LAYERS, full, hf_config, kv_caches, kv_config, vllm_config

CHUNK = 64


def sliding(window: int, extra: int = 0, block_tokens: int = BLOCK_TOKENS) -> SlidingWindowSpec:
    return SlidingWindowSpec(
        block_size=block_tokens, **HEAD, sliding_window=window, extra_retained_tokens=extra
    )


def mixed(*specs: KVCacheSpec) -> UniformTypeKVCacheSpecs:
    members = {f"layer {number}": spec for number, spec in enumerate(specs)}
    return UniformTypeKVCacheSpecs(block_size=BLOCK_TOKENS, kv_cache_specs=members)


def refusal(*specs: KVCacheSpec, chunk_tokens: int = CHUNK, group: str = "", **facts: object) -> str:
    config = kv_config(*specs)
    if group:
        config.kv_cache_groups[-1] = dataclasses.replace(config.kv_cache_groups[-1], **{group: True})
    with pytest.raises(UnsupportedError) as refused:
        layout.chunk_layout(vllm_config(**facts), config, chunk_tokens)
    return str(refused.value)


REFUSED: dict[str, KVCacheSpec] = {
    "MambaSpec": MambaSpec(block_size=BLOCK_TOKENS, shapes=((2, 8),), dtypes=(torch.float32,)),
    "ChunkedLocalAttentionSpec": ChunkedLocalAttentionSpec(
        block_size=BLOCK_TOKENS, **HEAD, attention_chunk_size=128
    ),
    "CrossAttentionSpec": CrossAttentionSpec(block_size=BLOCK_TOKENS, **HEAD),
    "EncoderOnlyAttentionSpec": EncoderOnlyAttentionSpec(block_size=BLOCK_TOKENS, **HEAD),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_that_can_not_be_cached_is_refused_by_its_name(kind: str) -> None:
    for specs in ([REFUSED[kind]], [full(), REFUSED[kind]], [mixed(full(), REFUSED[kind])]):
        assert refusal(*specs) == f"KV cache of the kind {kind} is not supported"


def test_attention_that_looks_ahead_is_refused() -> None:
    assert "looks ahead" in refusal(full(non_causal=True))


def test_kinds_that_share_a_group_are_refused() -> None:
    assert refusal(mixed(full(), sliding(32))) == (
        "KV caches of the kinds FullAttentionSpec, SlidingWindowSpec in one group are not supported"
    )
    both = layout.chunk_layout(vllm_config(), kv_config(mixed(full(), full())), CHUNK)
    assert len(both.groups) == 1


@pytest.mark.parametrize("group", ["host_resident", "is_eagle_group"])
def test_groups_of_a_draft_model_or_on_the_host_are_refused(group: str) -> None:
    assert refusal(full(), group=group) == "host-resident and draft-model KV cache groups are not supported"


def test_a_model_without_a_kv_cache_is_refused() -> None:
    assert refusal() == "the model has no KV cache"


@pytest.mark.parametrize("name", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_refused_with_its_option(name: str) -> None:
    assert refusal(full(), **{f"parallel_{name}": 2}) == (f"{name} = 2: context parallelism is not supported")


def test_a_chunk_is_whole_blocks_of_every_group() -> None:
    assert refusal(full(), chunk_tokens=40) == (
        "chunk_tokens = 40 is no multiple of the block size 16 and of the hash's 16: set another chunk_tokens"
    )
    assert "block size 24" in refusal(full(16), sliding(48, block_tokens=24), chunk_tokens=64)
    for wanted, chunk_tokens in ((1, 16), (16, 16), (64, 64)):
        chunks = layout.chunk_layout(vllm_config(), kv_config(full()), wanted)
        assert (chunks.chunk_tokens, chunks.groups[0].blocks_per_chunk) == (chunk_tokens, chunk_tokens // 16)


def test_hashes_may_be_of_fewer_tokens_than_blocks() -> None:
    config = kv_config(full(32), sliding(64, block_tokens=16), hash_block_size=8)
    chunks = layout.chunk_layout(vllm_config(), config, CHUNK)
    assert (chunks.hash_tokens, chunks.hashes_per_chunk) == (8, 8)
    assert [group.blocks_per_chunk for group in chunks.groups] == [2, 4]


@pytest.mark.parametrize("kind", [full(), MLAAttentionSpec(block_size=BLOCK_TOKENS, **HEAD)])
def test_full_attention_needs_all_of_a_prefix(kind: KVCacheSpec) -> None:
    assert layout.chunk_layout(vllm_config(), kv_config(kind), CHUNK).groups[0].window == 0


@pytest.mark.parametrize("block_tokens", [16, 32, 64])
@pytest.mark.parametrize("extra", [0, 3])
def test_a_windows_chunks_are_those_that_its_blocks_lie_in_and_no_more(block_tokens: int, extra: int) -> None:
    prefix = 40 * CHUNK
    for window in (1, 2, 16, 17, 18, 33, 63, 64, 65, 66, 128, 129, 1_000):
        spec = sliding(window, extra, block_tokens)
        chunks = layout.chunk_layout(vllm_config(), kv_config(full(), spec), CHUNK).groups[1].window
        first = prefix - (
            window - 1 + extra
        )  # the first token that the next one looks back at, or that is kept
        first_block = first // block_tokens * block_tokens
        assert chunks == max(1, -(-(prefix - first_block) // CHUNK)), window


def test_of_ranks_with_the_same_bytes_one_stores_and_they_share_a_part() -> None:
    _, caches, _ = kv_caches()
    config, _, _ = kv_caches()
    config = dataclasses.replace(config, kv_tp_replicas=2)
    chunks = layout.chunk_layout(vllm_config(), config, CHUNK)
    told = []
    for rank in range(8):
        engine = vllm_config(
            parallel_rank=rank, parallel_world_size=8, parallel_tensor_parallel_size=4,
            parallel_pipeline_parallel_size=2,
        )  # fmt: skip
        wire = layout.wire_layout(engine, config, chunks, layout.block_regions(config, caches), caches)
        told.append((wire.part, layout.stores_its_part(engine, config), wire.tp_rank, wire.pp_rank))
        assert wire.parts == 4
    assert told == [
        (0, True, 0, 0), (0, False, 1, 0), (1, True, 2, 0), (1, False, 3, 0),
        (2, True, 0, 1), (2, False, 1, 1), (3, True, 2, 1), (3, False, 3, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("order", ["LB", "BL"])
def test_a_block_is_the_same_row_of_every_region(order: str) -> None:
    config, caches, memory = kv_caches(order)
    regions = layout.block_regions(config, caches)
    page = full().page_size_bytes
    assert [tuple(region.shape) for region in regions] == (
        [(BLOCKS, page)] * LAYERS if order == "LB" else [(BLOCKS, LAYERS * page)]
    )
    assert layout.page_bytes(regions) == layout.block_bytes(config) == LAYERS * page
    memory.zero_()
    for region in regions:
        region[3] = 7
    for cache in caches.values():
        assert (cache[3] == 7).all()
        assert not cache[[block for block in range(BLOCKS) if block != 3]].any()


def test_without_a_tensor_there_is_nothing_to_cache() -> None:
    config, _, _ = kv_caches()
    with pytest.raises(UnsupportedError, match="no KV cache tensor"):
        layout.block_regions(config, {"another layer": torch.zeros(1)})


def name(
    *specs: KVCacheSpec, chunk_tokens: int = CHUNK, kv: "dict[str, object] | None" = None, **facts: object
) -> bytes:
    config = kv_config(*(specs or (full(),)), **(kv or {}))
    engine = vllm_config(**facts)
    return layout.namespace(engine, config, layout.chunk_layout(engine, config, chunk_tokens))


OTHERS: dict[str, dict[str, object]] = {
    "model": {"model_model": "another/model"},
    "revision": {"model_revision": "v2"},
    "dtype": {"model_dtype": torch.float16},
    "quantization": {"model_quantization": "awq"},
    "rope in the config or an override": {"model_hf_config": hf_config(rope_parameters={"rope_theta": 5e5})},
    "another config": {"model_hf_config": hf_config(text_config={"rope_parameters": {"rope_theta": 1e4}})},
    "cache dtype": {"cache_cache_dtype": "fp8"},
    "hash algorithm": {"cache_prefix_caching_hash_algo": "sha256_cbor"},
    "drawn hash seed": {"cache_prefix_caching_hash_algo": "xxhash"},
    "tensor parallelism": {"parallel_tensor_parallel_size": 2},
    "pipeline parallelism": {"parallel_pipeline_parallel_size": 2},
    "attention": {"attention_backend": "FLASHINFER"},
    "draft": {"speculative_draft_model_config": SimpleNamespace(model="some/draft", revision=None)},
    "load format": {"load_load_format": "dummy"},
    "layout": {"kv": {"kv_cache_layout": "BLHNC"}},
    "tokens per hash": {"kv": {"hash_block_size": 8}},
    "tokens per chunk": {"chunk_tokens": 128},
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_changes_the_bytes_changes_the_namespace(what: str) -> None:
    assert name(**OTHERS[what]) != name()


@pytest.mark.parametrize("length", [{"model_max_model_len": 8192}, {"model_original_max_model_len": -1}])
@pytest.mark.parametrize(
    ("config", "decides"),
    [
        ({"rope_parameters": {"rope_type": "longrope"}}, True),
        ({"text_config": {"rope_scaling": {"type": "su"}}}, True),
        ({"model_type": "llama4"}, True),
        ({"rope_parameters": {"rope_type": "yarn"}}, False),
    ],
)
def test_so_does_the_longest_request_where_it_decides_how_short_ones_are_computed(
    config: dict[str, object], decides: bool, length: dict[str, object]
) -> None:
    """Else engines that allow other lengths share what they store."""
    same = {"model_hf_config": hf_config(**config)}
    assert (name(**same, **length) != name(**same)) is decides


def test_so_does_the_commit_of_a_hubs_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its branch moves on.  What came is in the cache of the hub, without the hub."""
    hub = tmp_path / "models--some--model"
    for commit in ("a" * 40, "b" * 40):
        (hub / "snapshots" / commit).mkdir(parents=True)
        (hub / "snapshots" / commit / "config.json").write_text("{}")
    (hub / "refs").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    names = {name()}
    for commit in ("a" * 40, "b" * 40):
        (hub / "refs" / "main").write_text(commit)
        names.add(name())
        assert name() in names
    assert len(names) == 3
    assert name(model_revision="a" * 40) != name(model_revision="b" * 40)


def test_where_a_config_comes_from_and_which_objects_it_has_does_not() -> None:
    """All of these differ between hosts, or between two processes."""
    here = {
        "parts": [object()],
        "_name_or_path": "/here",
        "transformers_version": "5.0.0",
        "labels": {1: "a"},
    }
    there = {"parts": [object()], "name_or_path": "/there", "_commit_hash": "c", "labels": {"1": "a"}}
    assert name(model_hf_config=hf_config(**here)) == name(model_hf_config=hf_config(**there))


@pytest.mark.parametrize("specs", [(full(32),), (sliding(32),), (full(), sliding(32)), (full(), full())])
def test_so_do_the_cache_groups(specs: tuple[KVCacheSpec, ...]) -> None:
    assert name(*specs) != name()


def test_so_do_the_hash_seed_and_the_seed_of_dummy_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, dummy = name(), name(load_load_format="dummy")
    assert name(model_seed=1) == plain, "it makes no weights"
    assert name(load_load_format="dummy", model_seed=1) != dummy
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    assert name() != plain


def test_so_do_other_weights_under_the_same_path(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"old")
    old = name(model_model=str(tmp_path))
    (tmp_path / "notes.txt").write_text("no weights")
    assert name(model_model=str(tmp_path)) == old
    weights.write_bytes(b"newer")
    assert name(model_model=str(tmp_path)) != old


def test_what_does_not_change_the_bytes_does_not() -> None:
    """All ranks, and engines with caches of other sizes, share what they store."""
    config = dataclasses.replace(kv_config(full()), num_blocks=1_000)
    engine = vllm_config(parallel_rank=1, parallel_world_size=2, cache_enable_prefix_caching=False)
    assert layout.namespace(engine, config, layout.chunk_layout(engine, config, CHUNK)) == name()
