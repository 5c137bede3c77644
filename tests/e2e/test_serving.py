"""The real OpenAI server and streaming clients: the same tokens, and nothing is left of those who hang up."""

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from e2e.kit import CHUNK_TOKENS, HIT, Plain, connector, prompt, stored
from e2e.serving import Serving, Stream
from lmconnector.health import State
from processes import ServerProcess, eventually, server

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

CLIENTS = 8
ROUNDS = 5
PROCESSES = ("scheduler", "worker 0")
LOADS: dict[str, dict[str, object]] = {"before": {}, "beside": {"sync_load_ms": 0.0}}
LONG = 64  # tokens: long enough to leave while they come


@pytest.fixture(scope="module")
def cache() -> Iterator[ServerProcess]:
    with server("--capacity", "256MiB") as process:
        yield process


@pytest.fixture(scope="module")
def servings(
    cache: ServerProcess, plain: Plain, model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Serving]]:
    """They start at the same time."""
    begun: dict[str, Serving] = {}
    for loads, options in LOADS.items():
        folder = tmp_path_factory.mktemp("serving")
        ours = connector(cache.runtime_dir, **options)
        begun[loads] = Serving(folder / "serve.log", folder / "stubs", model("llama"), ours)
    with ExitStack() as stack:
        for serving in begun.values():
            stack.push(serving)
        for serving in begun.values():
            serving.started()
        yield begun


@pytest.fixture
def serving(servings: dict[str, Serving]) -> Serving:
    return servings["before"]


def at_once(jobs: list[Callable[[], Stream]]) -> list[Stream]:
    with ThreadPoolExecutor(len(jobs)) as clients:
        return [future.result() for future in [clients.submit(job) for job in jobs]]


def test_streams_are_the_same_with_the_cache(cache: ServerProcess, serving: Serving, plain: Plain) -> None:
    tokens = prompt(1)
    (right,) = plain.said(tokens, tokens=LONG)
    cold = serving.stream(tokens, LONG)
    assert (cold.said, cold.cached, cold.reason) == (right, 0, "length")
    stored(cache, HIT // CHUNK_TOKENS)
    local = serving.stream(tokens, LONG)
    assert local.said == right
    assert local.cached > HIT, "vLLM's own prefix cache"
    serving.reset()
    external = serving.stream(tokens, LONG)
    assert (external.said, external.cached) == (right, HIT)
    check_what_metrics_tell(cache, serving)


def check_what_metrics_tell(cache: ServerProcess, serving: Serving) -> None:
    """Of one prompt, stored and loaded once."""
    held_bytes = cache.status().arena.committed_bytes
    assert held_bytes > 0
    for copied in ("store", "load"):
        eventually(lambda copied=copied: told(serving, f"{copied}_bytes_total") == held_bytes, copied)
        assert 0 < told(serving, f"{copied}_seconds_total") < 1
    assert told(serving, "hit_tokens_total") == HIT
    assert told(serving, "chunks_stored_total") == HIT // CHUNK_TOKENS
    assert told(serving, "hook_errors_total") == 0
    for process in PROCESSES:
        assert 0 < told(serving, "ping_seconds", process=process) < 1
        assert states(serving, process) == ["healthy"]


def told(serving: Serving, name: str, **labels: str) -> float:
    return serving.metric(f"lmconnector_{name}", **labels)


def states(serving: Serving, process: str) -> list[str]:
    return [one.value for one in State if told(serving, "state", process=process, state=one.value)]


def test_concurrent_streams_are_the_same_with_the_cache(
    cache: ServerProcess, serving: Serving, plain: Plain
) -> None:
    known = [prompt(seed) for seed in range(10, 14)]
    for tokens in known:
        serving.stream(tokens)
    prompts = [*known, *(tokens[:700] + prompt(20, 300) for tokens in known)]
    right = plain.said(*prompts, tokens=LONG)
    serving.reset()
    streams = at_once([lambda tokens=tokens: serving.stream(tokens, LONG) for tokens in prompts])
    assert [stream.said for stream in streams] == right
    assert {stream.cached for stream in streams[:4]} == {HIT}
    assert all(stream.cached >= 640 for stream in streams[4:]), "of a neighbour's tokens or of the cache's"


def impatience(rng: random.Random) -> dict[str, float]:
    """When a client leaves: before it is served, most likely; while it is; or not at all."""
    return rng.choice(
        [
            {},
            {"leave_after_s": 10 ** rng.uniform(-3, -0.3)},
            {"leave_after_tokens": rng.randint(1, LONG // 2)},
        ]
    )


@pytest.mark.parametrize("loads", LOADS)
def test_clients_that_hang_up_leave_nothing_behind(
    loads: str, cache: ServerProcess, servings: dict[str, Serving], plain: Plain
) -> None:
    serving = servings[loads]
    rng = random.Random(4)
    known = [prompt(seed) for seed in range(10, 14)]
    before = cache.status().leases
    streams: list[Stream] = []
    for turn in range(ROUNDS):
        serving.reset()
        prompts = [*known, *(prompt(100 * turn + seed) for seed in range(CLIENTS - len(known)))]
        rng.shuffle(prompts)
        patience = [impatience(rng) for _ in prompts]
        right = plain.said(*prompts, tokens=LONG)
        jobs = [
            lambda tokens=tokens, patience=patience: serving.stream(tokens, LONG, **patience)
            for tokens, patience in zip(prompts, patience, strict=True)
        ]
        for stream, expected in zip(at_once(jobs), right, strict=True):
            streams.append(stream)
            assert stream.tokens == expected[0][: len(stream.tokens)]
            assert stream.logprobs == expected[1][: len(stream.logprobs)]
            assert stream.reason in ("length", "")
        eventually(lambda: not serving.metric("num_requests_running"), "the end of those left", 60.0)
    left = [stream for stream in streams if not stream.reason]
    assert any(not stream.tokens for stream in left), "some left before their first token"
    assert any(stream.tokens for stream in left), "some left after it"
    assert len(left) < len(streams)
    eventually(lambda: not cache.status().leases.outstanding, "no leases", 10.0)
    leases = cache.status().leases
    assert leases.granted > before.granted
    assert leases.expired == 0, "given back, not forgotten"
    serving.reset()
    after = serving.stream(known[0], LONG)
    assert (after.said, after.cached) == (plain.said(known[0], tokens=LONG)[0], HIT)
    assert "Traceback" not in serving.words()
    cache.check_conservation()


def test_metrics_tell_of_an_outage(cache: ServerProcess, serving: Serving) -> None:
    changes = ("healthy to degraded", "degraded to recovering", "recovering to healthy")
    before = [told(serving, "transitions_total", change=change) for change in changes]

    def all_are(state: State) -> bool:
        serving.stream(prompt(1))  # metrics are told with steps
        return all(states(serving, process) == [state.value] for process in PROCESSES)

    cache.kill()
    eventually(lambda: all_are(State.DEGRADED), "degraded")
    assert told(serving, "drops_total", reason="lookup_gate_shut") > 0
    cache.start()
    eventually(lambda: all_are(State.HEALTHY), "healthy")
    after = [told(serving, "transitions_total", change=change) for change in changes]
    assert after == [count + len(PROCESSES) for count in before], "once by each process"
