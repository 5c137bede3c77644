"""The state machine and the rule that judges a part, for any history."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from cache_server.beats import Awake, Bounds, Motion, Part
from cache_server.health import (
    DUMP_GAP_MS,
    TRANSITIONS,
    TRANSITIONS_KEPT,
    Finding,
    Health,
    Phase,
    Severity,
    State,
    Transition,
)
from cache_server.trials import Outcome, Result, TrialRules, Trials

FINDINGS = [Finding(severity, severity.name.lower(), "because") for severity in Severity]
ORDER = [Phase.STARTING, Phase.WORKING, Phase.PAUSED, Phase.DRAINING, Phase.STOPPED]
RULES = TrialRules(idle_ms=10_000, deadline_ms=2_000, fail_after=2)


@settings(deadline=None)  # a busy machine proves nothing
@given(
    st.lists(st.tuples(st.sampled_from(Phase), st.lists(st.sampled_from(FINDINGS)), st.integers(0, 10_000)))
)
def test_no_history_leads_over_an_illegal_edge(history: list[tuple[Phase, list[Finding], int]]) -> None:
    told: list[Transition] = []
    health = Health(0, told.append)
    now_ms, furthest = 0, Phase.STARTING
    for wanted, findings, passed_ms in history:
        phase = wanted
        now_ms += passed_ms
        if furthest in (Phase.DRAINING, Phase.STOPPED) or (
            furthest is not Phase.STARTING and phase is Phase.STARTING
        ):
            phase = max(phase, furthest, key=ORDER.index)  # nobody starts twice, or goes on after its end
        furthest = phase
        verdict = health.judge(phase, findings, now_ms)
        assert verdict.judged_ms == now_ms
        assert verdict.transitions == tuple(told[-TRANSITIONS_KEPT:])
        assert sum(verdict.transition_counts.values()) == len(told)
        if phase is Phase.WORKING:
            worst = max((finding.severity for finding in findings), default=None)
            expected = {None: State.READY, Severity.DEGRADED: State.DEGRADED}.get(worst, State.FAILING)
            assert verdict.state is expected
    for earlier, later in pairwise(told):
        assert earlier.new is later.old
        assert later.at_ms - earlier.at_ms == later.lasted_ms
    assert all(each.new in TRANSITIONS[each.old] for each in told)


def test_every_state_but_the_last_can_be_left_and_each_can_be_reached() -> None:
    assert set(TRANSITIONS) == set(State)
    assert [state for state, ways in TRANSITIONS.items() if not ways] == [State.STOPPED]
    assert set().union(*TRANSITIONS.values()) == set(State) - {State.STARTING}
    assert all(state not in ways for state, ways in TRANSITIONS.items())
    assert {state for state, ways in TRANSITIONS.items() if State.STOPPED in ways} == {State.DRAINING}


def test_a_reason_may_change_without_a_transition() -> None:
    told: list[Transition] = []
    health = Health(0, told.append)
    for now_ms, reason in enumerate(("one", "two"), 1):
        verdict = health.judge(Phase.WORKING, [Finding(Severity.UNREADY, reason, "r")], now_ms)
        assert (verdict.code, verdict.since_ms) == (reason, 1)
    assert len(told) == 1


def test_the_ring_keeps_the_last_hundred() -> None:
    health = Health(0, lambda _: None)
    for number in range(3 * TRANSITIONS_KEPT):
        health.judge(Phase.PAUSED if number % 2 else Phase.WORKING, [], number)
    transitions = health.verdict.transitions
    assert len(transitions) == TRANSITIONS_KEPT
    assert transitions[-1].at_ms == 3 * TRANSITIONS_KEPT - 1


@settings(deadline=None)  # a busy machine proves nothing
@given(
    beats=st.lists(st.tuples(st.integers(1, 3_000), st.booleans()), max_size=30),
    period_ms=st.sampled_from([0, 100]),
    wait_ms=st.integers(0, 10_000),
)
def test_a_part_stalls_exactly_when_its_work_does_not_move(
    beats: list[tuple[int, bool]], period_ms: int, wait_ms: int
) -> None:
    part = Part("part", Bounds(1_000, 2_000, period_ms), critical=True)
    pulse = part.begin(0, lambda: True)
    now_ms, since_ms = 0, None
    for passed_ms, working in beats:
        now_ms += passed_ms
        since_ms = now_ms if working else None
        pulse.tick(now_ms, since_ms)
    judged = part.judge(now_ms + wait_ms, 0)
    expected_ms = max(0, wait_ms - (0 if since_ms is not None else period_ms))
    if since_ms is None and not period_ms:
        assert judged.motion is Motion.IDLE, "idle is never a stall"
    elif expected_ms > 2_000:
        assert judged.motion is Motion.STALLED
        assert judged.unmoved_ms == expected_ms
    elif expected_ms > 1_000:
        assert judged.motion is Motion.LATE
    else:
        assert judged.motion in (Motion.IDLE, Motion.MOVING)


def test_a_lease_names_the_work_and_ends_with_it() -> None:
    part = Part("part", Bounds(1_000, 2_000, 100), critical=True)
    now_ms = 0
    pulse = part.begin(now_ms, lambda: True)
    with pulse.busy("outer", 60_000, lambda: now_ms), pulse.busy("inner", 30_000, lambda: now_ms):
        now_ms = 20_000
        judged = part.judge(now_ms, 0)
        assert (judged.motion, judged.lease, judged.unmoved_ms) == (Motion.LEASED, "inner", 19_900)
    assert part.leases == ()
    assert part.judge(now_ms, 0).motion is Motion.IDLE


def test_a_dead_thread_is_dead_under_a_lease_too() -> None:
    part = Part("part", Bounds(1_000, 2_000, 100), critical=True)
    lives = True
    pulse = part.begin(0, lambda: lives)
    with pulse.busy("long", 60_000, lambda: 0):
        lives = False
        assert part.judge(1, 0).motion is Motion.DEAD


def test_a_reader_is_awake_since_its_last_gap() -> None:
    awake = Awake(600)
    assert [awake.note(at_ms) for at_ms in (0, 200, 600, 1_200, 1_801, 2_000)] == [0, 0, 0, 0, 1_801, 1_801]


def test_dumps_are_one_for_an_incident_and_few_in_all() -> None:
    health = Health(0, lambda _: None)
    part = Part("loop", Bounds(1, 2, 1), critical=True)
    part.begin(0, lambda: True)
    stalled, well = {"loop": part.judge(100, 0)}, {"loop": part.judge(0, 0)}
    assert health.wants_dump(stalled, 100) == ["loop"]
    assert health.wants_dump(stalled, 200) == []
    assert health.wants_dump(well, 300) == []
    assert health.wants_dump(stalled, 400) == [], "too soon"
    assert health.wants_dump(well, 500) == []
    assert health.wants_dump(stalled, 100 + DUMP_GAP_MS) == ["loop"]


def test_finding_no_room_is_no_failure_and_heals_only_what_lies_before_it() -> None:
    for stage, failures in (("register", 0), ("read", 1)):
        trials = Trials(RULES, 0)
        trials.end(trials.begin(0), Outcome(Result.FAILED, stage), 0)
        trials.end(trials.begin(1), Outcome(Result.NO_ROOM, "reserve"), 1)
        assert trials.record().failures == failures
    assert not trials.record().failed


@settings(deadline=None)  # a busy machine proves nothing
@given(st.lists(st.tuples(st.sampled_from(Result), st.booleans()), max_size=30))
def test_runs_never_overlap_and_the_verdict_is_their_last_failures(
    history: list[tuple[Result, bool]],
) -> None:
    trials, now_ms = Trials(RULES, 0), 0
    failures = 0
    for result, hangs in history:
        now_ms += 60_000
        assert trials.is_due(now_ms, None)
        generation = trials.begin(now_ms)
        assert not trials.is_due(now_ms, None)
        if hangs:
            now_ms += RULES.deadline_ms + RULES.slack_ms + 1
            assert trials.give_up("read", now_ms)
            assert not trials.give_up("read", now_ms)
            assert not trials.end(generation, Outcome(result, "read"), now_ms)
            failures += 1
        else:
            assert trials.end(generation, Outcome(result, "read"), now_ms)
            failures = 0 if result is Result.OK else failures + (result is Result.FAILED)
        record = trials.record()
        assert (record.failures, record.failed) == (failures, failures >= RULES.fail_after)
        assert record.generation == generation


def test_no_answer_while_the_loop_is_leased_is_excused_and_a_wrong_answer_is_not() -> None:
    for unanswered, leased_ms, failures in ((True, 5, 0), (True, -1, 1), (False, 5, 1)):
        trials = Trials(RULES, 0)
        generation = trials.begin(3)
        trials.end(generation, Outcome(Result.FAILED, "read", unanswered=unanswered), 10, leased_ms)
        assert trials.record().failures == failures
