"""A real vLLM and a real server: the same tokens as without a cache, whatever happens to the server."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from e2e.engine import MULTI, NAME
from e2e.kit import (
    CHUNK_TOKENS,
    HIT,
    Engine,
    Plain,
    Said,
    check_that_wrong_bytes_show,
    connector,
    engines,
    hits_again,
    known,
    prompt,
    spoil_slot_table,
    stored,
)
from processes import ServerProcess, eventually, server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


def test_the_same_tokens_through_every_outage(
    plain: Plain, model: Callable[[str], Path], tmp_path: Path
) -> None:
    prompts = [prompt(seed) for seed in range(12)]
    prompts[1] = prompts[0][:600] + prompt(99, 400)  # a shared beginning
    with server("--capacity", "256MiB") as process:
        options = {"model": str(model("llama")), "connector": connector(process.runtime_dir)}
        with engines(Engine(tmp_path / "cached.log", **options)) as (cached,):
            right = plain.said(*prompts)
            check_hits(process, cached, prompts, right)
            check_deaths(process, cached, prompts, right)
            check_a_freeze(process, cached, prompts, right)
            check_a_lost_arena(process, cached, prompts, right)
            check_words(cached)
            process.check_conservation()
        check_new_engines(process, options, tmp_path, prompts[10], right[10])


def check_words(cached: Engine) -> None:
    words = cached.words()
    for once in (
        "options: dir=",
        f"chunk_tokens={CHUNK_TOKENS} (default 256)",
        "kv_load_failure_policy set to recompute",
    ):
        assert words.count(once) == 1, once
    assert "healthy -> degraded" in words
    assert "recovering -> healthy" in words
    assert "Traceback" not in words


def check_new_engines(
    process: ServerProcess, options: dict[str, object], logs: Path, tokens: list[int], right: Said
) -> None:
    """In new processes: one that knows the connector by its name alone, and one inside MultiConnector."""
    options = {**options, "disable_log_stats": False}  # MultiConnector looks ours up by name to tell them
    by_name = Engine(logs / "by_name.log", told_by=NAME, **options)
    inside = Engine(logs / "inside.log", told_by=MULTI, cores="1", **options)
    with engines(by_name, inside):
        known(process, engines=2)
        for engine in (by_name, inside):
            answer = engine.ask(tokens)
            assert (answer.said, answer.cached) == ([right], [HIT])
            assert engine.metric("lmconnector_hit_tokens") == HIT
            assert "Traceback" not in engine.words()
        check_that_wrong_bytes_show(by_name, process, tokens, right)
        spoil_slot_table(process)
        inside.reset()
        failed = inside.ask(tokens)
        assert (failed.said, failed.reasons) == ([right], ["length"]), "a load that failed is computed"
        assert inside.metric("lmconnector_drops", reason="load_stale") > 0


def check_hits(process: ServerProcess, cached: Engine, prompts: list[list[int]], right: list[Said]) -> None:
    first = cached.ask(prompts[0])
    assert (first.said, first.cached) == ([right[0]], [0])
    stored(process, HIT // CHUNK_TOKENS)
    local = cached.ask(prompts[0])
    assert local.said == [right[0]]
    assert local.cached[0] > HIT, "vLLM's own prefix cache"
    cached.reset()
    external = cached.ask(prompts[0])
    assert (external.said, external.cached) == ([right[0]], [HIT])
    cached.reset()
    shared = cached.ask(prompts[1])
    assert (shared.said, shared.cached) == ([right[1]], [600 // CHUNK_TOKENS * CHUNK_TOKENS])


def check_deaths(process: ServerProcess, cached: Engine, prompts: list[list[int]], right: list[Said]) -> None:
    process.kill()
    dead = cached.ask(prompts[2])
    assert (dead.said, dead.cached, dead.reasons) == ([right[2]], [0], ["length"])
    process.start()
    assert process.status().chunks.restored > 0
    hits_again(cached, prompts[0], right[0])
    assert process.status().counters["stored_chunks"] == 0, "they are from before its death"
    process.restart()  # at once, between two pings
    hits_again(cached, prompts[0], right[0])


def check_a_freeze(
    process: ServerProcess, cached: Engine, prompts: list[list[int]], right: list[Said]
) -> None:
    os.kill(process.pid, signal.SIGSTOP)
    for number in range(3, 9):
        cached.reset()
        frozen = cached.ask(prompts[number])
        assert (frozen.said, frozen.reasons) == ([right[number]], ["length"])
        time.sleep(0.3)
    os.kill(process.pid, signal.SIGCONT)
    hits_again(cached, prompts[0], right[0])


def check_a_lost_arena(
    process: ServerProcess, cached: Engine, prompts: list[list[int]], right: list[Said]
) -> None:
    (process.runtime_dir / "arena").unlink()
    assert cached.ask(prompts[9]).said == [right[9]]
    eventually(lambda: process.log.read_text().count("absent -> ready") > 3, "a fresh arena", 20.0)
    hits_again(cached, prompts[10], right[10])
