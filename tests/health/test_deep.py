"""`/health?deep=1` in simulated time: who asks, which run answers, and when at the latest."""

import pytest

from cache_server.http import DEEP_SLACK_MS
from cache_server.pages import Waiting
from cache_server.vitals import TURN_MS
from health.world import OK, World, failed, world_of

STEP_MS = 50


def answered(world: World, waiting: Waiting) -> tuple[int, int]:
    """-> the code, and after how long"""
    began_ms = world.now_ms
    while True:
        answer = waiting.answer(world.now_ms)
        if answer is not None:
            return answer.code, world.now_ms - began_ms
        world.run(STEP_MS)
        assert world.now_ms - began_ms < 60_000, "never answered"


def deadline_ms(world: World) -> int:
    return 2 * world.config.canary_deadline + DEEP_SLACK_MS


def asked(world: World) -> Waiting:
    waiting = world.ask("/health?deep=1")
    assert isinstance(waiting, Waiting)
    return waiting


def test_who_asks_while_a_run_is_on_gets_its_outcome_and_causes_no_other() -> None:
    with world_of() as world:
        world.started()
        world.canary.takes_ms = 1_000
        first = asked(world)
        world.run(2 * TURN_MS)
        runs = len(world.canary.orders)
        joined = [asked(world) for _ in range(5)]
        for waiting in (first, *joined):
            code, after_ms = answered(world, waiting)
            assert code == 200
            assert after_ms <= 1_000 + TURN_MS
        world.run(world.config.canary_idle // 2)
        assert len(world.canary.orders) == runs, "a superfluous run followed"


def test_who_asks_after_a_run_gets_a_new_one() -> None:
    with world_of() as world:
        world.started()
        for number in range(1, 4):
            runs = len(world.canary.orders)
            assert answered(world, asked(world))[0] == 200
            assert len(world.canary.orders) == runs + 1, number
            world.run(TURN_MS)


@pytest.mark.parametrize("phase_ms", range(0, 400, STEP_MS))
def test_a_run_that_hangs_is_told_when_it_is_given_up(phase_ms: int) -> None:
    with world_of() as world:
        world.started()
        world.run(phase_ms)
        world.canary.takes_ms = None
        code, after_ms = answered(world, asked(world))
        rules = world.config.trial_rules
        assert code == 503
        assert after_ms <= rules.deadline_ms + rules.slack_ms + 2 * TURN_MS < deadline_ms(world)
        code, after_ms = answered(world, asked(world))  # no run can begin: its thread has not come back
        assert (code, after_ms) == (503, deadline_ms(world))
        assert world.get("/live")[0] == 200
        runs = len(world.canary.orders)
        world.canary.takes_ms, world.canary.outcome = 5, OK
        world.run(2_000)
        assert len(world.canary.orders) == runs + 1, "one run for all that was asked meanwhile"


def test_with_a_dead_canary_thread_it_is_answered_at_the_deadline() -> None:
    with world_of() as world:
        world.started()
        world.canary.lives = False
        world.dead.add("canary")
        code, after_ms = answered(world, asked(world))
        assert (code, after_ms) == (503, deadline_ms(world))


def test_while_the_loop_is_leased_no_run_begins_and_the_deadline_answers() -> None:
    with world_of() as world:
        world.started()
        world.run(TURN_MS)
        runs = len(world.canary.orders)
        with world.pulses["loop"].busy("compacting", 60_000, lambda: world.now_ms):
            world.still.add("loop")
            world.run(TURN_MS)
            assert answered(world, asked(world)) == (503, deadline_ms(world))
            world.still.clear()
        assert len(world.canary.orders) == runs


def test_a_failure_is_said_with_its_stage() -> None:
    with world_of() as world:
        world.started()
        world.canary.outcome = failed("compare", "bytes differ")
        waiting = asked(world)
        world.run(2 * TURN_MS)
        answer = waiting.answer(world.now_ms)
        assert answer is not None
        assert answer.code == 503
        assert b'"reason":"failed at compare: bytes differ"' in answer.body
