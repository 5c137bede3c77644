"""Each bound of `detection` against what the server does, in simulated time and at many moments of a turn."""

import pytest

from cache_server.beat_page import read_beat
from cache_server.check import BAD, judge
from cache_server.detection import detection
from cache_server.hold_file import hold
from cache_server.holds import Hold
from cache_server.vitals import LOOP_TURN_MS, SNAPSHOT_MS, TURN_MS
from health.world import World, world_of
from kit import Peer

STEP_MS = 50
PHASES = range(0, 1_000, STEP_MS)


def degraded_after_ms(world: World, within_ms: int) -> int:
    began_ms = world.now_ms
    while world.get("/health")[1]["status"] != "degraded":
        world.run(STEP_MS)
        assert world.now_ms - began_ms <= within_ms
    return world.now_ms - began_ms


@pytest.mark.parametrize("phase_ms", PHASES)
def test_memory_that_can_not_be_had(phase_ms: int) -> None:
    with world_of(canary_idle="off") as world:
        world.started()
        world.run(phase_ms)
        world.tiers.observe("memory", "failed", "No space left", world.now_ms)
        bound_ms = detection(world.config).memory_ms
        assert world.first_ms("/ready", 503, 10_000) <= bound_ms
        assert world.get("/ready")[1]["code"] == "memory"
        assert world.get("/live")[0] == 200
        world.tiers.observe("memory", "ready", "", world.now_ms)
        assert world.first_ms("/ready", 200, 10_000) <= bound_ms


@pytest.mark.parametrize("phase_ms", PHASES)
def test_a_livelock(phase_ms: int) -> None:
    with world_of(work_age="3s", canary_idle="off") as world:
        world.started()
        world.run(phase_ms)
        world.pulses["loop"].tick(world.now_ms, since_ms=world.now_ms)
        after_ms = degraded_after_ms(world, 60_000)
        assert world.config.work_age < after_ms <= detection(world.config).livelock_ms
        assert world.get("/health")[1]["code"] == "livelocked"


@pytest.mark.parametrize("phase_ms", range(0, 1_000, 7))
def test_a_process_that_is_stopped(phase_ms: int) -> None:
    """Nothing of it turns any more; the page's age tells, to the millisecond."""
    with world_of(canary_idle="off") as world:
        world.started()
        world.run(phase_ms // STEP_MS * STEP_MS)
        stopped_ms = world.now_ms + phase_ms % STEP_MS
        beat = read_beat(world.config.runtime_dir)
        assert beat is not None
        bounds = detection(world.config)
        for ready, allowed_ms, bound_ms in (
            (True, world.config.late_after, bounds.process_stopped_unready_ms),
            (False, world.config.stall_after, bounds.process_stopped_dead_ms),
        ):
            # Its last turn lay a turn before at most.
            assert judge(beat, stopped_ms + bound_ms + 1, ready=ready).exit_code == BAD
            assert judge(beat, stopped_ms + allowed_ms - TURN_MS, ready=ready).exit_code != BAD


@pytest.mark.parametrize("phase_ms", range(0, 400, STEP_MS))
def test_a_pause_and_a_hold_and_their_ends(phase_ms: int) -> None:
    with world_of(canary_idle="off") as world:
        world.started()
        world.run(phase_ms)
        bounds = detection(world.config)
        world.paused = True
        assert world.first_ms("/ready", 503, 1_000) <= bounds.paused_ms
        world.paused = False
        assert world.first_ms("/ready", 200, 1_000) <= bounds.paused_ms
        hold(world.config.runtime_dir, Hold("me", "because", world.now_ms + 5_000), world.now_ms)
        assert world.first_ms("/ready", 503, 1_000) <= bounds.paused_ms
        said = world.get("/ready")[1]
        assert (said["code"], said["reason"]) == ("held", "by me: because")
        began_ms = world.now_ms
        (row,) = world.get("/health")[1]["holds"]
        assert row == {"owner": "me", "reason": "because", "left_s": pytest.approx(5, abs=0.25)}
        assert 5_000 - 2 * bounds.paused_ms <= world.first_ms("/ready", 200, 10_000) <= 5_000 + TURN_MS
        assert world.now_ms - began_ms <= 5_000 + TURN_MS
        assert world.get("/health")[1]["holds"] == []


def test_a_hold_neither_hides_what_is_graver_nor_touches_liveness() -> None:
    with world_of() as world:
        world.started()
        hold(world.config.runtime_dir, Hold("me", "because", world.now_ms + 60_000), world.now_ms)
        world.run(TURN_MS)
        assert world.get("/live")[0] == 200
        world.still.add("loop")
        world.run(world.config.stall_after + 2 * TURN_MS)
        said = world.get("/health")[1]
        assert said["code"] == "stalled"
        assert [finding["code"] for finding in said["findings"]] == ["stalled", "held"]
        assert world.get("/live")[0] == 503


@pytest.mark.parametrize("phase_ms", range(0, 1_000, 250))
def test_a_worker_that_falls_silent(phase_ms: int) -> None:
    with world_of(silent_after="2s", required_engines="e", canary_idle="off") as world:
        peer = Peer(world.service_world, "e").start()
        world.started()
        world.run(phase_ms)
        peer.ping()
        world.first_ms("/ready", 200, 2_000)
        peer.ping()
        after_ms = world.first_ms("/ready", 503, 60_000)
        assert 2_000 < after_ms <= detection(world.config).worker_silent_ms


def test_the_bounds_are_made_of_the_pace_of_the_parts() -> None:
    with world_of() as world:
        bounds = detection(world.config)
    assert bounds.memory_ms == LOOP_TURN_MS + SNAPSHOT_MS + TURN_MS
    assert bounds.process_stopped_dead_ms - bounds.loop_still_dead_ms == TURN_MS - LOOP_TURN_MS
