"""Each kind of KV cache that is supported, and one that is refused, with a tiny model of that kind."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from e2e.kit import LATENT_BACKEND, Engine, check_hits_and_wrong_bytes, connector, engines, prompt
from processes import ServerProcess, server
from tools import lacking

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

OPTIONS: dict[str, dict[str, object]] = {
    "sliding": {},
    "latent": {"attention_backend": LATENT_BACKEND},
    "llama": {"kv_cache_dtype": "fp8"},
    "convolution": {},
}
PLAIN: dict[str, dict[str, object]] = {  # compared with an engine without the connector too
    "sliding": {},
    "latent": {"cache_latents": True},
    "llama": {},
}
SMALL = {"num_gpu_blocks_override": 1024}  # memory for seven engines at a time


@pytest.fixture(scope="module")
def cache() -> Iterator[ServerProcess]:
    """One for all: their keys can't meet."""
    with server("--capacity", "256MiB") as process:
        yield process


@pytest.fixture(scope="module")
def started(
    cache: ServerProcess, model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Engine]]:
    """All at once; `plain KIND`: without the connector."""
    logs = tmp_path_factory.mktemp("kinds")
    options = {kind: {"model": str(model(kind)), **SMALL, **more} for kind, more in OPTIONS.items()}
    ours = {"connector": connector(cache.runtime_dir)}
    wanted = {kind: {**options[kind], **ours} for kind in OPTIONS}
    wanted |= {f"plain {kind}": options[kind] | more for kind, more in PLAIN.items()}
    begun = {
        name: Engine(logs / f"{name}.log", cores=str(at % 2), **these)
        for at, (name, these) in enumerate(wanted.items())
    }
    with engines(*begun.values()):
        yield begun


@pytest.mark.parametrize("kind", ["sliding", "latent", "llama"])
def test_a_kind_that_is_supported_hits(kind: str, cache: ServerProcess, started: dict[str, Engine]) -> None:
    if "kv_cache_dtype" in OPTIONS[kind] and not torch.cpu._is_avx512_supported():
        lacking("vLLM's fp8 KV cache needs AVX-512 on a CPU")
    check_hits_and_wrong_bytes(started[kind], cache, started.get(f"plain {kind}"))


def test_a_kind_that_is_refused_is_served_without_the_cache(
    cache: ServerProcess, started: dict[str, Engine]
) -> None:
    engine = started["convolution"]
    lookups = cache.status().counters["lookups"]
    first = engine.ask(prompt(1))
    engine.reset()
    second = engine.ask(prompt(1))
    assert (second.said, second.cached, second.reasons) == (first.said, [0], ["length"])
    assert cache.status().counters["lookups"] == lookups
    words = engine.words()
    for process in ("EngineCore", "Worker"):
        told = rf"^\({process} .*serving without the cache: KV cache of the kind MambaSpec is not supported"
        assert len(re.findall(told, words, re.MULTILINE)) == 1
    assert "Traceback" not in words
