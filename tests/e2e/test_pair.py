"""Two engines on one server, both short of KV cache: one loads before the step, one beside the steps.

The latter stores what it generates too.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from e2e.kit import (
    CHUNK_TOKENS,
    HIT,
    Engine,
    Plain,
    connector,
    engines,
    overwrite_all_chunks,
    prompt,
    spoil_slot_table,
    stored,
)
from processes import ServerProcess, eventually, server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

OPTIONS: dict[str, dict[str, object]] = {
    "before": {"sync_load_ms": 60_000.0},
    "beside": {"sync_load_ms": 0.0, "store_decode": True},
}
BOTH = pytest.mark.parametrize("loads", OPTIONS)
SHORT = {"num_gpu_blocks_override": 72, "max_model_len": 2048, "disable_log_stats": False}
LONG = 300  # tokens: enough for requests to outgrow the KV cache while they run
PREEMPTIONS = "num_preemptions"
DROPS = "lmconnector_drops"


@pytest.fixture(scope="module")
def cache() -> Iterator[ServerProcess]:
    with server("--capacity", "256MiB") as process:
        yield process


@pytest.fixture(scope="module")
def pair(
    cache: ServerProcess, plain: Plain, model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Engine]]:
    logs = tmp_path_factory.mktemp("pair")
    options = {"model": str(model("llama")), **SHORT}
    begun = {
        loads: Engine(
            logs / f"{loads}.log",
            cores=str(at),
            connector=connector(cache.runtime_dir, **ours),
            **options,
        )
        for at, (loads, ours) in enumerate(OPTIONS.items())
    }
    with engines(*begun.values()):
        yield begun


def check_that_nothing_is_left(cache: ServerProcess, engine: Engine) -> None:
    eventually(lambda: not cache.status().leases.outstanding, "no leases", 10.0)
    assert cache.check_conservation().leases.expired == 0, "given back, not forgotten"
    engine.reset()
    assert engine.metric("lmconnector_hook_errors") == 0
    assert "Traceback" not in engine.words()


@BOTH
def test_preempted_requests_are_right_with_hits_and_without(
    loads: str, cache: ServerProcess, pair: dict[str, Engine], plain: Plain
) -> None:
    engine = pair[loads]
    prompts = [prompt(seed, 300 + 37 * seed) for seed in range(8)]
    if loads == "beside":
        prompts = [tokens[::-1] for tokens in prompts]  # the other engine has stored those
    right = plain.said(*prompts, tokens=LONG)
    preemptions = engine.metric(PREEMPTIONS)
    cold = engine.ask(*prompts, tokens=LONG)
    assert cold.said == right
    preemptions_cold = engine.metric(PREEMPTIONS)
    assert preemptions_cold > preemptions
    check_that_nothing_is_left(cache, engine)
    hits = engine.ask(*prompts, tokens=LONG)
    assert hits.said == right
    assert sum(hits.cached) > 0
    assert engine.metric(PREEMPTIONS) > preemptions_cold
    check_that_nothing_is_left(cache, engine)


@BOTH
def test_identical_prompts_whose_load_fails_are_right(
    loads: str, cache: ServerProcess, pair: dict[str, Engine], plain: Plain
) -> None:
    """The server believes in chunks that the workers find to be others'."""
    engine = pair[loads]
    seeds = range(20, 23) if loads == "before" else range(30, 33)
    begun, neighbour, later = (prompt(seed, 400) for seed in seeds)
    right = plain.said(begun, neighbour, later)
    chunks = cache.status().chunks.stored
    eventually(lambda: engine.ask(begun) and cache.status().chunks.stored == chunks + 3, "stored", 20.0)
    engine.reset()
    spoil_slot_table(cache)
    overwrite_all_chunks(cache)
    for prompts in ((begun, begun, begun, begun, neighbour), (begun, begun)):
        stale = engine.metric(DROPS, reason="load_stale")
        failed = engine.ask(*prompts)
        assert failed.said == [right[0]] * prompts.count(begun) + [right[1]] * prompts.count(neighbour)
        assert set(failed.reasons) == {"length"}
        assert engine.metric(DROPS, reason="load_stale") > stale
        check_that_nothing_is_left(cache, engine)
    chunks = cache.status().chunks.stored
    eventually(lambda: engine.ask(later) and cache.status().chunks.stored == chunks + 3, "stored", 20.0)
    engine.reset()
    answer = engine.ask(later, later)
    assert answer.said == [right[2], right[2]]
    assert answer.cached[0] == 384


def test_two_engines_that_are_busy_at_once_use_each_others_chunks(
    cache: ServerProcess, pair: dict[str, Engine], plain: Plain
) -> None:
    shared, ours, theirs = ([prompt(100 * of + seed) for seed in range(4)] for of in (1, 2, 3))
    shared[3] = shared[2][:600] + prompt(109, 400)  # a shared beginning
    one, other = pair.values()
    chunks = cache.status().chunks.stored

    def ask_both() -> int:
        one.reset()
        other.reset()
        one.begin(*ours, *shared)
        other.begin(*theirs, *reversed(shared))
        assert one.end().said == plain.said(*ours, *shared)
        assert other.end().said == plain.said(*theirs, *reversed(shared))
        return cache.status().chunks.stored - chunks

    eventually(lambda: ask_both() == 7 * (4 + 4 + 3) + 3, "all chunks stored, each once", 60.0)
    one.reset()
    other.reset()
    one.begin(*theirs)
    other.begin(*ours)
    for engine, prompts in ((one, theirs), (other, ours)):
        answer = engine.end()
        assert (answer.said, answer.cached) == (plain.said(*prompts), [HIT] * len(prompts))
        check_that_nothing_is_left(cache, engine)


@BOTH
def test_generated_tokens_are_stored_where_that_is_an_option(
    loads: str, cache: ServerProcess, pair: dict[str, Engine], plain: Plain
) -> None:
    engine = pair[loads]
    asked = prompt(400, 300) if loads == "before" else prompt(401, 300)
    computed = len(asked) + LONG - 1 if loads == "beside" else len(asked)  # nobody computes from the last one
    chunks = computed // CHUNK_TOKENS
    before = cache.status().chunks.stored
    answer = engine.ask(asked, tokens=LONG)
    stored(cache, before + chunks)
    engine.reset()
    more = asked + answer.tokens[0] + prompt(402, 50)
    answer = engine.ask(more)
    assert (answer.said, answer.cached) == (plain.said(more), [chunks * CHUNK_TOKENS])
    check_that_nothing_is_left(cache, engine)


@BOTH
def test_who_has_another_cache_salt_finds_nothing(
    loads: str, cache: ServerProcess, pair: dict[str, Engine], plain: Plain
) -> None:
    engine = pair[loads]
    asked = prompt(500) if loads == "before" else prompt(501)
    right = plain.said(asked)

    def cached(salt: str) -> int:
        engine.reset()
        before = cache.status().chunks.stored
        answer = engine.ask(asked, salt=salt)
        assert answer.said == right
        stored(cache, before + (HIT - answer.cached[0]) // CHUNK_TOKENS)
        return answer.cached[0]

    assert [cached(salt) for salt in ("ours", "theirs", "", "ours", "theirs", "")] == [0, 0, 0, HIT, HIT, HIT]


def test_after_a_reset_of_the_connector_nothing_is_known_and_all_is_stored_anew(
    cache: ServerProcess, pair: dict[str, Engine], plain: Plain
) -> None:
    one, other = pair.values()
    asked = prompt(600)
    right = plain.said(asked)

    def cached(engine: Engine, *, connector: bool = False) -> int:
        engine.reset(connector=connector)
        answer = engine.ask(asked)
        assert answer.said == right
        return answer.cached[0]

    before = cache.status().chunks.stored
    assert cached(one) == 0
    stored(cache, before + HIT // CHUNK_TOKENS)
    assert (cached(one), cached(other)) == (HIT, HIT)
    assert cached(one, connector=True) == 0
    stored(cache, HIT // CHUNK_TOKENS)
    assert cached(one) == HIT
    assert cached(other) == 0, "its weights may be those from before"
    check_that_nothing_is_left(cache, one)
