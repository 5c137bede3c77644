"""A real vLLM and a real server: the same tokens as without a cache, whatever happens to the server."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cache_server.protocol.slots import read_header
from e2e.kit import Engine, engines, prompt
from processes import ServerProcess, eventually, server, short_dir

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CHUNK_TOKENS = 128
HIT = 1000 // CHUNK_TOKENS * CHUNK_TOKENS  # of a prompt of 1000 tokens


def connector(runtime_dir: Path) -> dict[str, object]:
    """Patient with lookups: on a machine this busy the server may have to wait for a core."""
    beat = {"heartbeat_interval_s": 0.5, "heartbeat_timeout_s": 0.3, "lookup_deadline_ms": 1_000}
    return {"dir": str(runtime_dir), "chunk_tokens": CHUNK_TOKENS, **beat}


def stored(process: ServerProcess, chunks: int) -> None:
    eventually(lambda: process.status().chunks.stored >= chunks, f"{chunks} chunks stored", 20.0)


def hits_again(engine: Engine, tokens: list[int], said: object) -> None:
    """Within a few heartbeats; and never a wrong token on the way."""

    def hit() -> bool:
        engine.reset()
        answer = engine.ask(tokens)
        assert answer.said == said
        return answer.cached == [HIT]

    eventually(hit, "hits again", 20.0)


def test_the_same_tokens_through_every_outage(model: Callable[[str], Path], tmp_path: Path) -> None:
    llama = str(model("llama"))
    with server("--capacity", "256MiB") as process:
        plain = Engine(tmp_path / "plain.log", model=llama)
        cached = Engine(tmp_path / "cached.log", model=llama, connector=connector(process.runtime_dir))
        with engines(plain, cached):
            prompts = [prompt(seed) for seed in range(12)]
            prompts[1] = prompts[0][:600] + prompt(99, 400)  # a shared beginning
            right = [plain.ask(tokens).said for tokens in prompts]
            plain.close()
            check_hits(process, cached, prompts, right)
            check_deaths(process, cached, prompts, right)
            check_a_freeze(process, cached, prompts, right)
            check_a_lost_arena(process, cached, prompts, right)
            words = cached.words()
            assert "healthy -> degraded" in words
            assert "recovering -> healthy" in words
            assert "Traceback" not in words
            process.check_conservation()


def check_hits(process: ServerProcess, cached: Engine, prompts: list[list[int]], right: list[object]) -> None:
    first = cached.ask(prompts[0])
    assert (first.said, first.cached) == (right[0], [0])
    stored(process, HIT // CHUNK_TOKENS)
    local = cached.ask(prompts[0])
    assert local.said == right[0]
    assert local.cached[0] > HIT, "vLLM's own prefix cache"
    cached.reset()
    external = cached.ask(prompts[0])
    assert (external.said, external.cached) == (right[0], [HIT])
    cached.reset()
    shared = cached.ask(prompts[1])
    assert (shared.said, shared.cached) == (right[1], [600 // CHUNK_TOKENS * CHUNK_TOKENS])


def check_deaths(
    process: ServerProcess, cached: Engine, prompts: list[list[int]], right: list[object]
) -> None:
    process.kill()
    dead = cached.ask(prompts[2])
    assert (dead.said, dead.cached, dead.reasons) == (right[2], [0], ["length"])
    process.start()
    assert process.status().chunks.restored > 0
    hits_again(cached, prompts[0], right[0])
    process.restart()  # at once, between two pings
    hits_again(cached, prompts[0], right[0])


def check_a_freeze(
    process: ServerProcess, cached: Engine, prompts: list[list[int]], right: list[object]
) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    for number in range(3, 9):
        cached.reset()
        frozen = cached.ask(prompts[number])
        assert (frozen.said, frozen.reasons) == (right[number], ["length"])
        time.sleep(0.3)
    os.kill(process.pid, signal.SIGCONT)
    hits_again(cached, prompts[0], right[0])


def check_a_lost_arena(
    process: ServerProcess, cached: Engine, prompts: list[list[int]], right: list[object]
) -> None:
    (process.runtime_dir / "arena").unlink()
    assert cached.ask(prompts[9]).said == right[9]
    eventually(lambda: process.log.read_text().count("absent -> ready") > 3, "a fresh arena", 20.0)
    hits_again(cached, prompts[10], right[10])


def test_another_process_hits_and_wrong_bytes_would_show(
    model: Callable[[str], Path], tmp_path: Path
) -> None:
    llama = str(model("llama"))
    with server("--capacity", "256MiB") as process:
        options = {"model": llama, "connector": connector(process.runtime_dir)}
        with engines(Engine(tmp_path / "writer.log", **options)) as (writer,):
            right = writer.ask(prompt(1)).said
            stored(process, HIT // CHUNK_TOKENS)
        with engines(Engine(tmp_path / "reader.log", **options)) as (reader,):
            hits_again(reader, prompt(1), right)
            reader.reset()
            overwrite_all_chunks(process.runtime_dir / "arena")
            wrong = reader.ask(prompt(1))
            assert wrong.cached == [HIT]
            assert wrong.said != right, "this model does not look at its KV cache: these tests prove nothing"


def overwrite_all_chunks(arena: Path) -> None:
    """Other finite numbers, without the server's knowledge."""
    with arena.open("r+b") as file:
        geometry, _ = read_header(file.read(4096))
        file.seek(geometry.data_at)
        file.write(b"\x3f" * geometry.slab_bytes)


def test_a_server_that_comes_late_is_used(model: Callable[[str], Path], tmp_path: Path) -> None:
    with short_dir() as directory:
        engine = Engine(tmp_path / "engine.log", model=str(model("llama")), connector=connector(directory))
        with engines(engine), ServerProcess(directory, "--capacity", "256MiB") as process:
            process.kill()
            right = engine.ask(prompt(1)).said
            process.start()
            process.populated()
            hits_again(engine, prompt(1), right)


@pytest.mark.parametrize("kind", ["sliding", "latent"])
def test_other_kinds_of_attention(kind: str, model: Callable[[str], Path], tmp_path: Path) -> None:
    """Compared with vLLM's own prefix hit: latent attention computes a cached prefix otherwise than a new
    one, with other roundings."""
    with server("--capacity", "256MiB") as process:
        engine = Engine(
            tmp_path / "engine.log", model=str(model(kind)), connector=connector(process.runtime_dir)
        )
        with engines(engine):
            begun = prompt(1)
            asked = begun[:HIT] + prompt(2, 100)
            eventually(lambda: engine.ask(begun) and process.status().chunks.stored >= 7, "stored", 30.0)
            local = engine.ask(asked)
            assert local.cached[0] > 0
            hits_again(engine, asked, local.said)
            assert "Traceback" not in engine.words()
