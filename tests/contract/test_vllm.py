"""What the connector relies on in the vLLM that is installed."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lmconnector
from lmconnector import plugin
from tools import lacking

ROOT = Path(__file__).parents[2]
GROUP = "vllm.general_plugins"
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "dtype": "bfloat16",
}
PLUGIN = """
import json
import sys
from lmconnector import plugin
light = not {"torch", "vllm", "zmq"} & set(sys.modules)
plugin.register()
plugin.register()
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as factory
lazy = "lmconnector.connector" not in sys.modules
found = factory.get_connector_class_by_name("LMConnector")
print(json.dumps([light, lazy, found is sys.modules["lmconnector.connector"].LMConnector]))
"""
MODULE = """
import json
import lmconnector.connector
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as factory
print(json.dumps([factory.get_connector_class_by_name("LMConnector") is lmconnector.connector.LMConnector]))
"""
REFUSED = """
import vllm
vllm.__version__ = "0.34.0"
import lmconnector.connector
"""
SEEDS = """
import os
from lmconnector import hashes
from vllm.utils import hashing
from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed
for given in ({}, {"PYTHONHASHSEED": "7"}):
    os.environ.update(given)
    for algorithm in ("sha256", "sha256_cbor", "xxhash", "xxhash_cbor"):
        theirs = {resolve_none_hash_seed(hashing.get_hash_fn_by_name(algorithm)) for _ in range(2)}
        stable = hashes.why_unstable(algorithm, os.environ) is None
        assert stable == (len(theirs) == 1), algorithm
        assert not stable or theirs == {hashes.seed(algorithm, os.environ)}, algorithm
print("[true]")
"""
NAMESPACE = """
import json
import os
import sys
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from lmconnector import layout
config = EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_engine_config()
spec = FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=16, dtype=torch.bfloat16)
cache = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
chunks = layout.chunk_layout(config, cache, 64)
plain = layout.namespace(config, cache, chunks)
os.environ["PYTHONHASHSEED"] = "7"
before = layout.namespace(config, cache, chunks)
init_none_hash(sha256)
print(json.dumps([before == layout.namespace(config, cache, chunks), before != plain, chunks.hash_tokens]))
"""

NAMESPACES = """
import json
import pickle
import sys
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from lmconnector import layout
spec = FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=16, dtype=torch.bfloat16)
cache = KVCacheConfig(num_blocks=4, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
names = []
for folder in sys.argv[1:]:
    for length in (4096, 8192):
        args = EngineArgs(model=folder, max_model_len=length, skip_tokenizer_init=True)
        config = args.create_engine_config()
        name = layout.namespace(config, cache, layout.chunk_layout(config, cache, 64))
        worker = pickle.loads(pickle.dumps(config))  # as it comes to the processes of an engine
        assert layout.namespace(worker, cache, layout.chunk_layout(worker, cache, 64)) == name
        assert worker.instance_id == config.instance_id, "by it the server tells two starts of an engine"
        names.append(name.hex())
print(json.dumps(names))
"""
KEYS = """
import json
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request
from lmconnector.geometry import ChunkLayout
def lora(name, path):
    return {"lora_request": LoRARequest(name, 1, path)}
def image(name):
    where = PlaceholderRange(offset=70, length=20)
    return {"mm_features": [MultiModalFeatureSpec(None, "image", name, where)]}
cases = {
    "plain": {},
    "adapter": lora("one", "/a"), "other name": lora("two", "/a"), "other path": lora("one", "/b"),
    "image": image("one"), "other image": image("two"),
    "salt": {"cache_salt": "one"}, "other salt": {"cache_salt": "two"},
}
init_none_hash(sha256)
hasher = get_request_block_hasher(16, sha256)
chunks = ChunkLayout(64, 16, ())
def keys(more):
    sampling = SamplingParams(max_tokens=1)
    request = Request("name", list(range(130)), sampling, None, block_hasher=hasher, **more)
    return [key.hex() for key in chunks.chunk_hashes(request.block_hashes)]
print(json.dumps([[name, keys(more)] for name, more in cases.items()]))
"""


def run(code: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    pytest.importorskip(
        "vllm", reason="the engine is not installed: `make setup` brings it", exc_type=ImportError
    )
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths, "VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip


def answers(code: str, *arguments: str) -> list[object]:
    done = run(code, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_entry_point_leads_to_the_function_that_registers() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    target = project["entry-points"][GROUP]["lmconnector"]
    point = importlib.metadata.EntryPoint("lmconnector", target, GROUP)
    assert point.load() is plugin.register


def test_the_entry_point_is_found_as_vllm_finds_it() -> None:
    points = [point for point in importlib.metadata.entry_points(group=GROUP) if point.name == "lmconnector"]
    if not points:
        lacking("installed before there was an entry point: `make setup` installs again")
    assert points[0].load() is plugin.register


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert lmconnector.__version__ == project["version"]


def test_the_plugin_registers_twice_without_harm_and_imports_nothing_before_it_is_asked() -> None:
    assert answers(PLUGIN) == [True, True, True]


def test_the_connector_registers_itself_where_only_its_module_is_named() -> None:
    assert answers(MODULE) == [True]


def test_another_vllm_is_refused_when_the_connector_is_imported() -> None:
    done = run(REFUSED)
    assert done.returncode == 1
    assert (
        "VersionError: vLLM 0.34.0 is not supported: lmconnector works with vLLM 0.30 to 0.33" in done.stderr
    )


def test_seeds_are_what_vllm_makes_of_them() -> None:
    assert answers(SEEDS) == [True]


def test_a_namespace_is_the_same_before_and_after_vllm_has_drawn_its_seed(tmp_path: Path) -> None:
    """Processes of one engine ask at different times."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    assert answers(NAMESPACE, str(tmp_path)) == [True, True, 16]


def test_a_namespace_is_that_of_a_config_in_any_process(tmp_path: Path) -> None:
    """The first model's config is edited between the two engines; what the last one computes differs with the
    longest request that is allowed."""
    pytest.importorskip("torch")
    from lmconnector.demo.model import BASE, KINDS

    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    longrope = {
        **MODEL, "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "pad_token_id": 0,
        "max_position_embeddings": 8192, "original_max_position_embeddings": 4096,
        "rope_scaling": {"type": "longrope", **factors},
    }  # fmt: skip
    configs = {
        "edited": {**BASE, **KINDS["llama"]},
        "latent": {**BASE, **KINDS["latent"]},
        "longrope": longrope,
    }
    folders = [tmp_path / name for name in configs]
    for folder, config in zip(folders, configs.values(), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
    edited, _, latent, _, *lengths = before = answers(NAMESPACES, *map(str, folders))
    assert before[:4] == [edited, edited, latent, latent]
    assert len({edited, latent, *lengths}) == 4
    (folders[0] / "config.json").write_text(json.dumps(configs["edited"] | {"rope_theta": 5e5}))
    after = answers(NAMESPACES, *map(str, folders))
    assert after[2:] == before[2:]
    assert after[0] != edited


def test_a_chunk_is_found_for_the_same_adapter_images_and_salt_alone_and_in_any_process() -> None:
    """By vLLM's own hashes of a request's blocks.  The image begins in the second chunk."""
    first, again = (dict(answers(KEYS)) for _ in range(2))
    assert first == again
    assert {len(keys) for keys in first.values()} == {2}
    assert len({keys[1] for keys in first.values()}) == len(first)
    same = {"plain", "image", "other image"}
    assert len({keys[0] for name, keys in first.items() if name in same}) == 1
    assert len({keys[0] for name, keys in first.items()}) == len(first) - len(same) + 1
