"""Faults that health systems really had, each once against this server's; simulated time."""

import ast
from pathlib import Path

import pytest

from cache_server.beat_page import read_beat
from cache_server.beats import LEASE_MS_MAX, Bounds, Motion, Part
from cache_server.config import KEYS, ConfigError, gather, parse
from cache_server.detection import detection
from cache_server.endpoints import Endpoints, Requirement, Tiers, describe
from cache_server.limits import Limits
from cache_server.pages import Waiting
from cache_server.vitals import LOOP_TURN_MS, SNAPSHOT_MS, TURN_MS
from health.world import OK, World, failed, unanswered, world_of
from kit import Peer, chain, make_service

DAY_MS = 86_400_000
STEP_MS = 50
TOLD_MS = SNAPSHOT_MS + LOOP_TURN_MS + TURN_MS  # from the loop's knowledge to the state


def the_service(world: World):
    return world.service_world.service


def test_trap_01_a_run_whose_outcome_is_lost_fails_and_a_later_one_recovers() -> None:
    with world_of() as world:
        world.started()
        world.canary.takes_ms = None  # it hangs
        rules = world.config.trial_rules
        world.run(rules.idle_ms + rules.deadline_ms + rules.slack_ms + TURN_MS)
        assert world.watch.told.record.failures == 1
        assert world.get("/ready")[0] == 200, "one lost run is no verdict"
        world.canary.takes_ms = 5
        world.run(rules.retry_ms + 2 * TURN_MS)
        assert world.watch.told.record.failures == 0
        assert world.states == ["ready"]


def test_trap_02_twenty_deep_questions_are_one_run() -> None:
    with world_of() as world:
        world.started()
        before = len(world.canary.orders)
        waiting = [world.ask("/health?deep=1") for _ in range(20)]
        assert all(isinstance(each, Waiting) for each in waiting)
        world.run(2 * TURN_MS)
        answers = [each.answer(world.now_ms) for each in waiting]
        assert [answer.code for answer in answers] == [200] * 20
        assert len(world.canary.orders) == before + 1


def test_trap_04_a_paused_server_whose_loop_is_dead_is_not_live() -> None:
    with world_of() as world:
        world.started()
        world.paused = True
        world.run(1_000)
        code, said = world.get("/ready")
        assert (code, said["state"], said["code"]) == (503, "paused", "paused")
        assert world.get("/live")[0] == 200
        world.still.add("loop")
        world.run(world.config.stall_after + 2 * TURN_MS)
        code, said = world.get("/live")
        assert (code, said["code"]) == (503, "stalled")
        world.still.clear()
        world.dead.add("loop")
        world.run(TURN_MS)
        assert world.get("/live")[1]["code"] == "dead"


def test_trap_05_two_minutes_under_a_lease_are_unready_live_and_two_transitions() -> None:
    with world_of() as world:
        world.started()
        world.canary.takes_ms, world.canary.outcome = 1_600, unanswered()
        with world.pulses["loop"].busy("compacting", 120_000, lambda: world.now_ms):
            world.still.add("loop")
            ready_for_ms = world.first_ms("/ready", 503, 5_000)
            for _ in range(100):
                world.run(1_000)
                assert world.get("/live")[0] == 200
                code, said = world.get("/ready")
                assert (code, said["code"]) == (503, "busy")
            (row,) = [each for each in world.get("/health")[1]["components"] if each["component"] == "loop"]
            assert row["state"] == "leased"
            assert row["leases"] == [{"name": "compacting", "left_s": pytest.approx(15, abs=6)}]
            world.still.clear()
            world.canary.takes_ms, world.canary.outcome = 5, OK
        world.first_ms("/ready", 200, 1_000)
        world.run(5_000)
        assert world.states == ["ready", "failing", "ready"]
        assert ready_for_ms <= world.config.late_after + LOOP_TURN_MS + STEP_MS


def test_trap_05_a_lease_is_bounded_and_what_outlives_it_is_a_stall() -> None:
    with world_of() as world:
        world.started()
        with pytest.raises(AssertionError), world.pulses["loop"].busy("ever", LEASE_MS_MAX + 1, lambda: 0):
            pass
        with world.pulses["loop"].busy("hung", 20_000, lambda: world.now_ms):
            world.still.add("loop")
            world.run(20_000)
            assert world.get("/live")[0] == 200
            found_ms = world.first_ms("/live", 503, 60_000)
            assert found_ms <= world.config.stall_after + STEP_MS


def test_trap_06_a_livelock_is_found_by_the_age_of_the_work() -> None:
    with world_of(work_age="10s") as world:
        world.started()
        begun_ms = world.now_ms
        world.pulses["loop"].tick(world.now_ms, since_ms=begun_ms)  # and it ticks on, finishing nothing
        world.run(9_000)
        assert world.get("/health")[1]["status"] == "ready"
        world.run(2_000)
        code, said = world.get("/health")
        assert (code, said["status"], said["code"]) == (200, "degraded", "livelocked")
        assert world.get("/live")[0] == 200
        world.pulses["loop"].tick(world.now_ms, None, finished=1)
        world.run(TURN_MS)
        assert world.get("/health")[1]["status"] == "ready"


DURATIONS = ["late_after", "stall_after", "work_age", "pause_limit", "canary_idle", "canary_deadline"]


@pytest.mark.parametrize(
    "text", ["nan", "inf", "-1s", "0", "0s", "abc", "", "1", "1e9s", "∞", "nans", "infs"]
)
@pytest.mark.parametrize(
    "key", [*DURATIONS, "canary_fail_after", "required_count", "starting_status", "live_path"]
)
def test_trap_07_what_is_no_sound_value_is_refused_at_the_start(key: str, text: str) -> None:
    if (key, text) in {("canary_fail_after", "1"), ("required_count", "1")}:
        return
    with pytest.raises(ConfigError, match=f"^{key} = .*expected"):
        parse(gather({key: text}, {}, None))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"late_after": "10s"}, ["late_after", "stall_after", "10s"]),
        ({"canary_deadline": "10s"}, ["canary_deadline", "canary_idle"]),
        ({"required_count": "2"}, ["required_count", "required_engines"]),
        ({"ready_path": "/live"}, ["ready_path", "live_path"]),
        ({"live_path": "/status"}, ["live_path", "/status"]),
        ({"canary_job": '{"part_bytes": 1073741824}'}, ["canary_job", "at most"]),
    ],
)
def test_trap_07_values_that_contradict_each_other_are_named(flags: dict[str, str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(gather(flags, {}, None))
    for word in words:
        assert word in str(caught.value)


WRONG_JOBS = [
    '{"chunks": 0}', '{"chunks": 17}', '{"chunks": 1.5}', '{"size": 1}', "[]", "x", "@/nowhere",
    '{"part_bytes": -1}', '{"check_bytes": 0}', '{"part_bytes": NaN}',
]  # fmt: skip


@pytest.mark.parametrize("text", WRONG_JOBS)
def test_trap_07_a_canary_job_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^canary_job = .*expected JSON such as"):
        parse(gather({"canary_job": text}, {}, None))


def test_a_canary_job_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text('{"chunks": 3, "part_bytes": 8192}')
    job = parse(gather({"canary_job": f"@{file}"}, {}, None)).canary_job
    assert (job.chunks, job.part_bytes, job.window) == (3, 8192, 0)


@pytest.mark.parametrize("phase_ms", range(0, 500, STEP_MS))
def test_trap_08_a_standstill_is_found_and_forgotten_within_the_bounds(phase_ms: int) -> None:
    with world_of(late_after="1s", stall_after="3s", canary_idle="off") as world:
        world.started()
        world.run(phase_ms)
        world.still.add("loop")
        config = world.config
        unready_ms = world.first_ms("/ready", 503, 60_000)
        bounds = detection(config)
        assert unready_ms <= bounds.loop_still_unready_ms + STEP_MS
        assert world.get("/live")[0] == 200, "readiness goes first"
        dead_ms = unready_ms + world.first_ms("/live", 503, 60_000)
        assert config.stall_after < dead_ms <= bounds.loop_still_dead_ms + STEP_MS
        assert "loop: has not moved for 3." in world.get("/live")[1]["reason"]
        world.still.clear()
        assert world.first_ms("/live", 200, 1_000) <= LOOP_TURN_MS
        assert world.first_ms("/ready", 200, 1_000) <= LOOP_TURN_MS + TURN_MS


@pytest.mark.parametrize("phase_ms", range(0, 10_000, 950))
def test_trap_08_a_broken_path_is_found_and_forgotten_within_the_bounds(phase_ms: int) -> None:
    with world_of() as world:
        world.started()
        world.run(phase_ms // STEP_MS * STEP_MS)
        world.canary.outcome, world.canary.takes_ms = failed(), world.config.canary_deadline
        bounds = detection(world.config)
        assert world.first_ms("/ready", 503, 60_000) <= bounds.path_broken_ms + STEP_MS
        said = world.get("/ready")[1]
        assert said["code"] == "canary"
        assert "failed at read" in said["reason"]
        assert world.get("/live")[0] == 200
        world.canary.outcome, world.canary.takes_ms = OK, 5
        assert world.first_ms("/ready", 200, 60_000) <= bounds.path_mended_ms + STEP_MS


def test_trap_08_the_other_bounds_hold_too() -> None:
    with world_of(silent_after="1s", canary_idle="off", work_age="3s", required_engines="e") as world:
        bounds = detection(world.config)
        peer = Peer(world.service_world, "e").start()
        world.started()
        peer.ping()
        assert world.first_ms("/ready", 503, 60_000) <= bounds.worker_silent_ms + STEP_MS
        peer.ping()
        world.first_ms("/ready", 200, 2_000)
        world.paused = True
        assert world.first_ms("/ready", 503, 60_000) <= bounds.paused_ms
        world.paused = False
        world.run(2 * TURN_MS)
        world.draining = True
        assert world.first_ms("/ready", 503, 60_000) == bounds.draining_ms


def test_trap_09_a_restart_between_two_pings_shows_in_the_next_pong() -> None:
    world = make_service()
    peer = Peer(world).start()
    before = peer.ping()
    world.start()
    after = peer.ping()
    assert before.known
    assert not after.known
    assert before.boot != after.boot


def test_trap_13_a_part_that_was_begun_anew_does_not_hear_its_old_thread() -> None:
    part = Part("loop", Bounds(1_000, 2_000, period_ms=100), critical=True)
    old = part.begin(0, lambda: True)
    part.begin(1_000, lambda: True)
    for now_ms in range(1_000, 10_000, 100):
        old.tick(now_ms, finished=1)
    old.end()
    assert part.judge(10_000, 0).motion is Motion.STALLED
    assert part.beat.epoch == 2
    assert part.beat.ticks == 0


@pytest.mark.parametrize("part", ["loop", "watch", "http"])
def test_trap_14_a_dead_critical_thread_ends_liveness(part: str) -> None:
    with world_of() as world:
        world.started()
        world.dead.add(part)
        world.now_ms += STEP_MS
        code, said = world.get("/live")
        assert (code, said["code"], said["reason"]) == (503, "dead", f"{part}: its thread is dead")


def test_trap_14_a_dead_canary_thread_degrades_and_at_last_takes_readiness() -> None:
    with world_of() as world:
        world.started()
        world.dead.add("canary")
        world.canary.lives = False
        world.run(1_000)
        code, said = world.get("/ready")
        assert (code, said["state"]) == (200, "degraded")
        found_ms = world.first_ms("/ready", 503, 60_000)
        assert world.get("/ready")[1]["code"] == "unproven"
        assert found_ms <= world.config.trial_rules.failure_found_within_ms + TURN_MS
        assert world.get("/live")[0] == 200


def test_trap_15_a_registered_client_that_idles_for_a_day_is_never_reaped() -> None:
    world = make_service()
    peer = Peer(world).start()
    peer.reserve(1)
    for _ in range(100):
        assert world.pass_ms(DAY_MS // 100) == []
    assert peer.ping().known
    assert len(world.service.registry) == 1
    assert world.arena.reserved_bytes(peer.owner)


def test_trap_16_a_reaped_client_learns_it_from_the_pong_and_registers_again() -> None:
    world = make_service(limits=Limits(reclaim_grace_ms=10))
    peer = Peer(world).start()
    peer.kill()
    world.pass_ms(1)
    assert len(world.pass_ms(100)) == 1
    assert not peer.ping().known
    peer.spawn()
    peer.register()
    assert peer.ping().known


def test_trap_17_nothing_at_all_is_neither_started_nor_healthy() -> None:
    with world_of() as world:
        assert world.get("/ready")[0] == 503
        assert world.get("/startup")[0] == 503
        assert world.get("/live")[0] == 200
        world.watch.turn(world.now_ms)
        assert world.get("/startup")[0] == 503
    for count in ("all", "any", "1"):
        assert Requirement(("*",), count).unmet(()), "no engine meets no requirement"


@pytest.mark.parametrize(("count", "needed"), [("all", 3), ("any", 1), ("2", 2)])
def test_required_engines_gate_readiness(count: str, needed: int) -> None:
    with world_of(required_engines="prefill-*", required_count=count, canary_idle="off") as world:
        world.turned = True
        world.run(1_000)
        assert world.get("/ready")[1]["code"] == "required"
        peers = [Peer(world.service_world, f"prefill-{number}") for number in range(3)]
        for peer in peers:
            peer.start()
        world.run(TOLD_MS)
        assert world.get("/ready")[0] == 200
        for gone in range(1, 4):
            peers[gone - 1].kill()
            the_service(world).registry.observe(frozenset(world.service_world.locked), world.now_ms)
            for peer in peers[gone:]:
                peer.ping()
            world.run(TOLD_MS)
            code, said = world.get("/ready")
            assert code == (200 if 3 - gone >= needed else 503), said


def test_an_optional_engine_that_is_silent_degrades() -> None:
    with world_of(silent_after="1s", canary_idle="off") as world:
        world.started()
        peer = Peer(world.service_world, "lonely").start()
        world.run(TOLD_MS)
        assert world.get("/health")[1]["status"] == "ready"
        world.run(2_000)
        code, said = world.get("/health")
        assert (code, said["status"], said["code"]) == (200, "degraded", "impaired")
        (row,) = said["engines"]
        assert (row["state"], row["required"], row["pinged_s"]) == ("silent", False, None)
        assert row["since_s"] == pytest.approx(1.8, abs=0.5)
        peer.ping()
        world.run(TOLD_MS)
        assert world.get("/health")[1]["status"] == "ready"


def test_trap_22_no_run_begins_while_one_that_was_given_up_has_not_come_back() -> None:
    with world_of() as world:
        world.started()
        world.canary.takes_ms = None
        world.run(60_000)
        assert len(world.canary.orders) == 2, "the first of all, and the one that hangs"
        assert world.get("/health")[1]["canary"]["failures"] == 1
        world.canary.takes_ms = 5
        world.run(2_000)
        assert world.get("/health")[1]["canary"]["late"] == 1


def test_trap_23_a_late_outcome_of_an_older_run_is_no_verdict() -> None:
    with world_of(canary_fail_after="1") as world:
        world.started()
        world.canary.takes_ms = None
        rules = world.config.trial_rules
        world.run(rules.idle_ms + rules.deadline_ms + rules.slack_ms + 2 * TURN_MS)
        assert world.get("/ready")[1]["code"] == "canary"
        world.canary.takes_ms, world.canary.outcome = 0, OK  # now the old one says that all was well
        world.run(TURN_MS)
        record = world.watch.told.record
        assert (record.late, record.failures) == (1, 1)
        assert world.get("/ready")[0] == 503


def test_trap_25_live_stays_green_while_not_ready() -> None:
    with world_of(canary_fail_after="1", required_engines="x") as world:
        assert world.get("/live")[0] == 200
        world.turned = True
        world.run(1_000)
        for change in ("canary", "paused", "draining"):
            if change == "canary":
                world.canary.outcome = failed()
                world.run(20_000)
            else:
                setattr(world, change, True)
                world.run(1_000)
            assert world.get("/ready")[0] == 503
            assert world.get("/live")[0] == 200
            beat = read_beat(world.config.runtime_dir)
            assert (beat.live, beat.ready) == (True, False), "so the exec probe says too"
        world.stopped = True
        world.run(TURN_MS)
        assert world.get("/live")[0] == 200
        assert world.states[-2:] == ["draining", "stopped"]


def test_trap_26_without_a_canary_the_start_ends_and_readiness_comes() -> None:
    with world_of(canary_idle="off") as world:
        world.turned = True
        world.run(TURN_MS)
        assert world.get("/ready")[0] == 200
        assert world.canary.orders == []
        waiting = world.ask("/health?deep=1")
        assert isinstance(waiting, Waiting), "asked for, it runs all the same"
        world.run(2 * TURN_MS)
        assert waiting.answer(world.now_ms).code == 200


WALL_CLOCKS = {"time", "time_ns", "now", "today", "utcnow", "gmtime", "localtime"}


def test_trap_28_nothing_is_decided_by_the_wall_clock() -> None:
    package = Path(__file__).parents[2] / "cache_server"
    used = {
        (path.name, node.attr)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr in WALL_CLOCKS
        and isinstance(node.value, ast.Name)
        and node.value.id in {"time", "datetime", "date"}
    }
    assert used == {("server.py", "time_ns")}, "the arena's history, for people"


def test_a_process_that_slept_blames_nobody_for_it() -> None:
    with world_of() as world:
        world.started()
        for slept_ms in (5_000, 60_000, DAY_MS):
            world.sleep(slept_ms)
            assert world.get("/live")[0] == 200, "whoever wakes up first"
            world.watch.turn(world.now_ms)
            assert world.get("/live")[0] == 200
            world.run(2_000)
            assert world.get("/ready")[0] == 200
        assert world.states == ["ready"]


def test_real_traffic_makes_the_canary_superfluous() -> None:
    with world_of(capacity="16MiB") as world:
        world.started()
        before = len(world.canary.orders)
        peer = Peer(world.service_world).start()
        for round_number in range(60):
            peer.store(chain(1, f"{round_number}"))
            peer.lookup(chain(1, f"{round_number}"))
            peer.release("request")
            world.run(1_000)
        assert len(world.canary.orders) == before
        world.run(world.config.canary_idle + 1_000)
        assert len(world.canary.orders) == before + 1


def test_a_drain_takes_readiness_at_once_and_before_the_watch_knows() -> None:
    with world_of() as world:
        world.started()
        world.draining = True
        code, said = world.get("/ready")
        assert (code, said["code"]) == (503, "draining")
        assert world.get("/live")[0] == 200


def test_one_stall_is_one_dump(caplog: pytest.LogCaptureFixture) -> None:
    with world_of() as world:
        world.started()
        for _ in range(3):
            world.still.add("loop")
            world.run(15_000)
            world.still.clear()
            world.run(1_000)
        dumps = [record for record in caplog.records if "stacks of all threads" in record.getMessage()]
        assert len(dumps) == 1, "and no other within a minute"


def test_starting_may_count_as_ready() -> None:
    with world_of(starting_status="ready") as world:
        assert world.get("/ready")[0] == 200
        assert world.get("/startup")[0] == 503


def test_paths_are_as_configured() -> None:
    with world_of(live_path="/healthz/live") as world:
        assert world.get("/healthz/live")[0] == 200
        assert "/live" not in world.answering.pages


def test_every_new_key_is_in_the_help() -> None:
    assert all(key.help for key in KEYS.values())


def test_memory_that_can_not_be_had_fails_and_a_part_of_it_degrades() -> None:
    world, tiers = make_service(), Tiers()
    tiers.observe_memory(world.service, "No space left", world.now_ms)
    whole: Endpoints = describe(world.service, Requirement(), tiers, world.now_ms)
    assert "a part of it can't be had" in whole.impaired
    raw = make_service()
    raw = type(raw)(populated=False)
    tiers.observe_memory(raw.service, "No space left", raw.now_ms + 10)
    nothing = describe(raw.service, Requirement(), tiers, raw.now_ms)
    assert "nothing of it can be had" in nothing.failed_tier
    assert nothing.tiers[0].since_ms == raw.now_ms + 10
    tiers.observe_memory(raw.service, "", raw.now_ms)
    assert describe(raw.service, Requirement(), tiers, raw.now_ms).failed_tier == ""


def test_of_many_engines_the_worst_are_shown_and_all_are_counted() -> None:
    world = make_service(limits=Limits(silent_after_ms=1_000))
    peers = [Peer(world, f"engine-{number}").start() for number in range(300)]
    world.now_ms += 2_000
    for peer in peers[:-1]:
        peer.ping()
    shown = describe(world.service, Requirement(("engine-299",)), Tiers(), world.now_ms)
    assert (len(shown.engines), len(shown.workers)) == (256, 256)
    assert (shown.engines[0].engine, shown.engines[0].state) == ("engine-299", "silent")
    assert shown.engine_counts == {"warming": 0, "ready": 299, "silent": 1, "gone": 0}
    assert shown.unmet == "0 of 1 required engines are ready, 1 must be: engine-299 is silent"
    assert shown.impaired == "", "it is required, and so not optional"


def test_an_engine_lacking_a_rank_warms_up() -> None:
    world = make_service()
    peer = Peer(world, ranks=2)
    peer.spawn(0)
    peer.register(0)
    (row,) = describe(world.service, Requirement(), Tiers(), world.now_ms).engines
    assert (row.state, row.reason) == ("warming", "1 of 2 workers are registered")
    peer.spawn(1)
    peer.register(1)
    (row,) = describe(world.service, Requirement(), Tiers(), world.now_ms).engines
    assert (row.state, row.workers) == ("ready", 2)
    peer.kill(1)
    world.service.registry.observe(frozenset(world.locked), world.now_ms)
    (row,) = describe(world.service, Requirement(), Tiers(), world.now_ms).engines
    assert (row.state, row.reason) == ("gone", "1 of 2 processes gone")
