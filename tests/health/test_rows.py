"""The values in /health and in the metrics, not only their names."""

import pytest

from cache_server.answers import JSON
from cache_server.protocol.messages import CHUNKS_MAX, Code
from cache_server.vital_metrics import VitalMetrics
from cache_server.vitals import TURN_MS
from health.world import World, failed, world_of
from kit import Peer, RefusedError, chain

TOLD_MS = 800


def rows(world: World, of: str) -> list[dict]:
    world.run(TOLD_MS)
    return world.get("/health")[1][of]


def samples(world: World, name: str) -> dict[tuple[str, ...], float]:
    """By the labels' values, in the order of their names."""
    told = world.watch.told
    metrics = VitalMetrics(world.answering._facts(world.now_ms), told.canary_latency, told.dumps, {})
    return {
        tuple(value for _, value in sorted(each.labels.items())): each.value
        for metric in metrics.collect()
        for each in metric.samples
        if each.name == f"cache_server_{name}"
    }


def test_ages_count_from_what_happened() -> None:
    with world_of(canary_idle="off") as world:
        world.started()
        peer = Peer(world.service_world, "engine").start()
        for row in (*rows(world, "engines"), *rows(world, "workers")):
            assert (row["pinged_s"], row["stored_s"], row["found_s"]) == (None, None, None)
            assert row["registered_s"] == pytest.approx(1.2, abs=0.5)
        world.run(10_000)
        peer.store(chain(2))
        world.run(5_000)
        assert peer.lookup(chain(2)).chunks == 2
        world.run(3_000)
        peer.ping()
        world.run(2_000)
        for row in (*rows(world, "engines"), *rows(world, "workers")):
            since_ping_s = row["pinged_s"]
            assert since_ping_s == pytest.approx(3.2, abs=0.9)
            assert row["found_s"] - since_ping_s == pytest.approx(3, abs=0.01)
            assert row["stored_s"] - since_ping_s == pytest.approx(8, abs=0.01)
            assert row["registered_s"] - row["stored_s"] == pytest.approx(11.6, abs=0.51)


def test_the_last_refusal_of_an_engine_is_told_with_its_age() -> None:
    with world_of(canary_idle="off") as world:
        world.started()
        peer, calm = (Peer(world.service_world, name).start() for name in ("busy", "calm"))
        with pytest.raises(RefusedError):
            peer.reserve(CHUNKS_MAX)
        world.run(10_000)
        calm.ping()
        for of in ("engines", "workers"):
            erring, well = sorted(rows(world, of), key=lambda row: row["engine"])
            assert erring["last_error"].startswith(f"{Code.TOO_LARGE}: ")
            assert erring["last_error_s"] == pytest.approx(11, abs=1.5)
            assert (well["last_error"], well["last_error_s"]) == ("", None)


def test_changes_of_state_are_counted_by_their_ends_and_their_code() -> None:
    with world_of() as world:
        world.started()
        for _ in range(2):
            world.still.add("loop")
            world.run(world.config.stall_after + 2 * TURN_MS)
            world.still.clear()
            world.run(4 * TURN_MS)
        world.paused = True
        world.run(TURN_MS)
        world.paused = False
        world.run(TURN_MS)
        world.canary.outcome = failed()
        world.first_ms("/ready", 503, 60_000)
        counted = dict(world.watch.told.verdict.transition_counts)
        assert counted == {
            ("starting", "ready", "ok"): 1,
            ("ready", "failing", "late"): 2,
            ("failing", "ready", "ok"): 2,
            ("ready", "paused", "paused"): 1,
            ("paused", "ready", "ok"): 1,
            ("ready", "failing", "canary"): 1,
        }
        assert samples(world, "transitions_total") == {
            (old, code, new): count for (old, new, code), count in counted.items()
        }
        assert {state for (state,), is_it in samples(world, "state").items() if is_it} == {"failing"}
        assert (samples(world, "ready"), samples(world, "live")) == ({(): 0}, {(): 1})


def test_each_change_of_state_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    with world_of() as world:
        world.started()
        world.still.add("loop")
        world.run(60_000)
        world.still.clear()
        world.run(2_000)
        lines = [each.getMessage() for each in caplog.records if each.getMessage().startswith("health: ")]
        assert [line.split(" why=")[0] for line in lines if " -> " in line] == [
            "health: starting -> ready",
            "health: ready -> failing",
            "health: failing -> ready",
        ]


def test_every_page_says_what_it_is() -> None:
    with world_of(canary_idle="off") as world:
        world.started()
        types = {path: world.ask(path).content_type for path in world.answering.pages}
        assert types.pop("/metrics").startswith("text/plain; version=")
        assert types.pop("/") == "text/html; charset=utf-8"
        assert set(types.values()) == {JSON}
