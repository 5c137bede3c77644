"""Tensor parallel engines: each rank stores and loads its own part, or the one that all ranks share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.kit import (
    CHUNK_TOKENS,
    HIT,
    LATENT_BACKEND,
    Engine,
    check_hits_and_wrong_bytes,
    connector,
    engines,
    hits_again,
    known,
    prompt,
    stored,
)
from processes import server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

CORES = "0|1"
OPTIONS = {"tensor_parallel_size": 2, "num_gpu_blocks_override": 1024}
# Two ranks take both of a small machine's cores, and the server gets what they leave.
PATIENT = {"heartbeat_interval_s": 2.0, "heartbeat_timeout_s": 2.0, "lookup_deadline_ms": 5_000}
CHUNKS = HIT // CHUNK_TOKENS
LAYERS, NUMBER_BYTES = 4, 4  # in float32
ONE_HEAD_BYTES = 2 * CHUNK_TOKENS * LAYERS * 2 * 32 * NUMBER_BYTES  # two ranks' keys and values
LATENT_BYTES = CHUNK_TOKENS * LAYERS * (512 + 64) * NUMBER_BYTES


def test_two_ranks_hit_through_a_reset_a_death_and_in_a_new_process(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    """Compared with two ranks without a cache: they round otherwise than one."""
    options = {"model": str(model("llama")), **OPTIONS}
    first, second, third = (prompt(seed) for seed in range(3))
    with server("--capacity", "256MiB") as process:
        plain = Engine(tmp_path / "plain.log", cores=CORES, **options)
        options["connector"] = connector(process.runtime_dir, **PATIENT)
        with engines(plain, Engine(tmp_path / "cached.log", cores=CORES, **options)) as (_, cached):
            right = [plain.ask(tokens).said[0] for tokens in (first, second, third)]
            known(process, workers=2)
            cold = cached.ask(first)
            assert (cold.said, cold.cached) == ([right[0]], [0])
            stored(process, CHUNKS)
            hits_again(cached, first, right[0])
            process.kill()
            dead = cached.ask(second)
            assert (dead.said, dead.cached) == ([right[1]], [0])
            process.start()
            assert process.status().chunks.restored == CHUNKS
            hits_again(cached, first, right[0])
            hits_again(cached, third, right[2])
            assert "Traceback" not in cached.words()
        with engines(Engine(tmp_path / "another.log", cores=CORES, **options)) as (another,):
            known(process, workers=2)
            answer = another.ask(first, third)
            assert (answer.said, answer.cached) == ([right[0], right[2]], [HIT, HIT])
        process.check_conservation()


@pytest.mark.parametrize(("kind", "chunk_bytes"), [("one_head", ONE_HEAD_BYTES), ("latent", LATENT_BYTES)])
def test_ranks_have_a_part_each_unless_all_hold_the_same(
    kind: str, chunk_bytes: int, model: Callable[[str], Path], tmp_path: Path
) -> None:
    """One-head attention is compared with two ranks without the connector, latent attention with itself: vLLM
    has no prefix cache for it here, and computes something else without one."""
    with server("--capacity", "256MiB") as process:
        patient = connector(process.runtime_dir, **PATIENT)
        options = {"model": str(model(kind)), **OPTIONS}
        if kind == "latent":
            options["attention_backend"] = LATENT_BACKEND
        plain = [Engine(tmp_path / "plain.log", cores=CORES, **options)] if kind == "one_head" else []
        engine = Engine(tmp_path / f"{kind}.log", cores=CORES, connector=patient, **options)
        with engines(engine, *plain):
            known(process, workers=2)
            check_hits_and_wrong_bytes(engine, process, *plain)
        status = process.check_conservation()
        assert status.arena.committed_bytes == chunk_bytes * status.chunks.stored
