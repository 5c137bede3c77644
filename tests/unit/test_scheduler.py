"""The scheduler's side with a real service: hits, waits, loads of either kind, no store made twice."""

from pathlib import Path

import msgspec
import pytest

from cache_server.protocol import messages as m
from engine_side import BLOCK_TOKENS, CHUNK_TOKENS, PAGE_BYTES, Engine
from kit import ARENA_ID
from lmconnector.pace import Pace


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path / "arena")


@pytest.fixture
def beside(tmp_path: Path) -> Engine:
    """Every load runs beside the steps."""
    return Engine(tmp_path / "arena", sync_load_ms=0.0)


def arrive(engine: Engine, name: str, tokens: int = 160, **options):
    prompt = engine.prompt(name, tokens)
    for key, value in options.items():
        setattr(prompt, key, value)
    engine.scheduler.on_new_request(prompt)
    return prompt


def test_a_prompt_is_stored_and_the_next_one_loads_it(engine: Engine) -> None:
    first = engine.prompt("first", 160)
    engine.run(first)
    assert engine.scheduler.counts["chunks_stored"] == 5
    second = arrive(engine, "second")
    assert engine.scheduler.matched_tokens(second, 0) == (159, False), "one token is to be computed"
    engine.scheduler.on_allocated(second, [second.blocks], 159)
    assert engine.step(second) == (set(), set(), set())
    assert (engine.cache[second.blocks] == engine.cache[first.blocks]).all()
    assert engine.leases() == 1
    engine.scheduler.on_finished("second")
    engine.step()
    assert engine.leases() == 0
    assert engine.scheduler.counts["hit_tokens"] == 159


@pytest.mark.parametrize(
    ("patience", "others", "beside"), [(1 / 60, 0, True), (1 / 2, 0, False), (1 / 2, 1, True)]
)
def test_a_load_that_only_one_waits_for_may_take_longer(
    tmp_path: Path, patience: float, others: int, beside: bool
) -> None:
    """`patience`: `sync_load_ms`, as a share of what the load is expected to take."""
    expected_ms = Pace(PAGE_BYTES).ms_of(10)
    engine = Engine(tmp_path / "arena", sync_load_ms=patience * expected_ms)
    engine.run(engine.prompt("first", 160))
    for number in range(others):
        arrive(engine, f"other {number}", 10)
    assert engine.scheduler.matched_tokens(arrive(engine, "second"), 0) == (159, beside)


def test_a_local_hit_is_completed_from_where_it_ends(engine: Engine) -> None:
    first = engine.prompt("first", 160)
    engine.run(first)
    second = arrive(engine, "second", 200)
    local = 3 * BLOCK_TOKENS
    assert engine.scheduler.matched_tokens(second, local) == (160 - local, False)
    engine.scheduler.on_allocated(second, [second.blocks], 160 - local)
    before = engine.cache[second.blocks[:3]].clone()
    engine.step(second)
    assert (engine.cache[second.blocks[:3]] == before).all(), "those are the engine's own"
    assert (engine.cache[second.blocks[3:10]] == engine.cache[first.blocks[3:10]]).all()


def test_what_has_no_slots_yet_is_stored_when_they_come(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "arena", stock_slots=2)
    prompt = arrive(engine, "asks for more than there is")
    engine.scheduler.on_allocated(prompt, [prompt.blocks], 0)
    engine.step(prompt)
    for _ in range(3):
        prompt.num_tokens, prompt.answered = prompt.num_tokens + 1, prompt.answered + 1
        engine.step(prompt)
    assert engine.scheduler.counts["chunks_stored"] == 5
    assert engine.scheduler.counts["drops/store_no_slot"] == 0
    assert not engine.scheduler.storing


def test_what_ends_before_its_slots_come_is_told_as_dropped(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "arena", stock_slots=2)
    prompt = arrive(engine, "asks for more than there is")
    engine.scheduler.on_allocated(prompt, [prompt.blocks], 0)
    engine.link.answers = False
    engine.step(prompt)
    engine.scheduler.on_finished(prompt.request_id)
    assert engine.scheduler.counts["drops/store_no_slot"] == 3


def test_whose_load_beside_failed_steps_aside_once(beside: Engine) -> None:
    """Those behind it in vLLM's queue may have the blocks that it needs."""
    beside.run(beside.prompt("first", 160))
    second = arrive(beside, "second")
    matched, is_beside = beside.scheduler.matched_tokens(second, 0)
    assert is_beside
    beside.scheduler.on_allocated(second, [second.blocks], matched)
    beside.arena = None
    assert beside.step() == ({"second"}, {"second"}, set())
    assert beside.scheduler.matched_tokens(second, 0) == (None, False)
    assert beside.scheduler.matched_tokens(second, 0) == (0, False)


def test_nobody_joins_a_load_that_may_yet_fail(engine: Engine) -> None:
    """vLLM lets a request share blocks from when they are allocated, and has only the one that loads them
    compute them when that fails: it may be aborted before."""
    engine.run(engine.prompt("first", 160))
    loads, joins = arrive(engine, "loads"), arrive(engine, "joins", 200)
    stranger = engine.prompt("stranger", 160, "another chain")
    engine.scheduler.on_new_request(stranger)
    local = 2 * BLOCK_TOKENS
    assert engine.scheduler.matched_tokens(loads, local) == (159 - local, False)
    engine.scheduler.on_allocated(loads, [loads.blocks], 159 - local)
    assert engine.scheduler.matched_tokens(joins, 144) == (None, False)
    assert engine.scheduler.matched_tokens(joins, local) == (160 - local, False), "it shares what was there"
    assert engine.scheduler.matched_tokens(stranger, 144) == (0, False)
    engine.step(loads)
    assert engine.scheduler.matched_tokens(joins, 144) == (16, False), "the load is over"


def test_a_local_hit_as_long_gives_the_lease_back(engine: Engine) -> None:
    engine.run(engine.prompt("first", 160))
    second = arrive(engine, "second", 200)
    assert engine.scheduler.matched_tokens(second, 160) == (0, False)
    engine.scheduler.on_allocated(second, [second.blocks], 0)
    engine.step(second)
    assert engine.leases() == 0


def test_all_lookups_of_a_step_wait_no_longer_than_one(engine: Engine) -> None:
    engine.link.answers = False
    prompts = [arrive(engine, str(number)) for number in range(20)]
    began_ms = engine.world.now_ms
    assert [engine.scheduler.matched_tokens(prompt, 0) for prompt in prompts] == [(None, False)] * 20
    assert engine.world.now_ms - began_ms == 2, "lookup_wait_ms"
    engine.step()
    assert engine.scheduler.matched_tokens(prompts[0], 0) == (None, False)
    assert engine.world.now_ms - began_ms == 4, "each step anew"


def test_a_lookup_that_nobody_answers_becomes_a_miss(engine: Engine) -> None:
    engine.link.answers = False
    prompt = arrive(engine, "asked")
    engine.world.now_ms += 100
    engine.step()
    assert engine.scheduler.matched_tokens(prompt, 0) == (0, False)
    assert "disappointed" in engine.gate.heard
    assert engine.scheduler.counts["drops/lookup_late"] == 1
    engine.step()
    assert engine.leases() == 0, "the server may have answered"


def test_an_error_on_the_way_out_keeps_no_request_waiting(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(request: m.Request) -> bool:
        if isinstance(request, m.Lookup):
            raise TypeError("can't be encoded")
        return False

    monkeypatch.setattr(engine.link, "send", broken)
    prompt = engine.prompt("asked", 160)
    with pytest.raises(TypeError, match="encoded"):
        engine.scheduler.on_new_request(prompt)
    assert engine.scheduler.matched_tokens(prompt, 0) == (None, False)
    engine.world.now_ms += 100
    assert engine.scheduler.matched_tokens(prompt, 0) == (0, False)


def test_a_gate_that_shuts_ends_the_wait_at_once(engine: Engine) -> None:
    engine.link.answers = False
    prompt = arrive(engine, "asked")
    engine.gate.usable = False
    began_ms = engine.world.now_ms
    assert engine.scheduler.matched_tokens(prompt, 0) == (0, False)
    assert engine.world.now_ms == began_ms
    late = arrive(engine, "late")
    assert engine.scheduler.matched_tokens(late, 0) == (0, False)
    assert engine.scheduler.counts["drops/lookup_gate_shut"] == 2


def test_the_reply_to_a_request_that_is_gone_returns_its_lease(engine: Engine) -> None:
    engine.run(engine.prompt("first", 160))
    prompt = arrive(engine, "aborted")
    engine.scheduler.on_finished(prompt.request_id)
    engine.step()
    engine.step()
    assert engine.leases() == 0


def test_a_request_that_must_not_read_the_cache_is_not_looked_up(engine: Engine) -> None:
    engine.run(engine.prompt("first", 160))
    prompt = arrive(engine, "logprobs", skip_reading_prefix_cache=True)
    assert engine.scheduler.matched_tokens(prompt, 0) == (0, False)
    assert engine.link.kinds().count("Lookup") == 1
    engine.step(prompt)
    assert engine.scheduler.counts["chunks_stored_before"] == 5, "what it computes is as good as any"


def test_long_loads_run_beside_the_steps_and_only_one_for_the_same_chunks(beside: Engine) -> None:
    first = beside.prompt("first", 160)
    beside.run(first)
    leader, follower = arrive(beside, "leader"), arrive(beside, "follower")
    assert beside.scheduler.matched_tokens(leader, 0) == (159, True)
    beside.scheduler.on_allocated(leader, [leader.blocks], 159)
    assert beside.scheduler.matched_tokens(follower, 0) == (None, False), "it waits for the leader's load"
    assert until_loaded(beside, "leader")
    assert (beside.cache[leader.blocks] == beside.cache[first.blocks]).all()
    assert beside.scheduler.matched_tokens(follower, 144) == (0, False), "less than a block is computed"


def until_loaded(engine: Engine, name: str) -> bool:
    """-> whether that went well"""
    for _ in range(10_000):
        ended, failed, _ = engine.step()
        if name in ended:
            return name not in failed
    raise AssertionError("the load has not ended")


def test_whose_load_takes_too_long_is_not_waited_for(beside: Engine) -> None:
    beside.run(beside.prompt("first", 160))
    leader, follower = arrive(beside, "leader"), arrive(beside, "follower")
    assert beside.scheduler.matched_tokens(leader, 0) == (159, True)
    beside.scheduler.on_allocated(leader, [leader.blocks], 159)
    beside.world.now_ms += 2_000
    assert beside.scheduler.matched_tokens(follower, 0) == (159, True)


def test_the_lease_of_an_aborted_load_is_held_until_it_ends(beside: Engine) -> None:
    beside.run(beside.prompt("first", 160))
    prompt = arrive(beside, "aborted")
    assert beside.scheduler.matched_tokens(prompt, 0) == (159, True)
    beside.scheduler.on_allocated(prompt, [prompt.blocks], 159)
    plan = beside.plan()
    beside.scheduler.on_finished("aborted")
    assert beside.leases() == 1
    beside.worker.load(plan)
    assert until_loaded(beside, "aborted")
    beside.step()
    assert beside.leases() == 0
    assert not len(beside.scheduler.jobs)


def test_a_failed_load_is_not_offered_again_and_nothing_of_its_step_is_stored(engine: Engine) -> None:
    engine.run(engine.prompt("first", 160))
    prompt, other = arrive(engine, "second", 200), engine.prompt("other", 64, "other")
    engine.scheduler.on_new_request(other)
    assert engine.scheduler.matched_tokens(prompt, 0) == (160, False)
    engine.scheduler.on_allocated(prompt, [prompt.blocks], 160)
    found = engine.scheduler._loading._loads[0].pieces[2]
    engine.scheduler._loading._loads[0].pieces[2] = found._replace(slot=found.slot._replace(generation=999))
    assert engine.step(prompt, other) == (set(), set(), set(prompt.blocks[:10]))
    assert engine.scheduler.matched_tokens(prompt, 0) == (0, False)
    assert engine.blocks.held == []
    assert engine.blocks.forgotten == prompt.blocks, "and what was computed from them"
    assert engine.scheduler.counts["chunks_stored"] == 5, "the first prompt's"
    assert engine.scheduler.counts["drops/store_failed"] == 3
    engine.step()
    assert engine.leases() == 0


def test_a_chunk_is_stored_once_by_two_prompts_that_share_it(engine: Engine) -> None:
    first, second = arrive(engine, "first"), arrive(engine, "second", 192)
    for prompt in (first, second):
        assert engine.scheduler.matched_tokens(prompt, 0) == (0, False)
    plan = engine.plan(first, second)
    assert [len(store.pieces) for store in plan.stores] == [5, 1]
    engine.scheduler.on_outcome(engine.work(plan)[3])
    engine.step()
    assert engine.scheduler.counts["chunks_stored"] == 6
    third = arrive(engine, "third", 192)
    assert engine.scheduler.matched_tokens(third, 0) == (191, False)


def test_a_reset_forgets_what_was_stored_and_found(engine: Engine) -> None:
    engine.run(engine.prompt("first", 160))
    waiting, asked = arrive(engine, "waiting"), arrive(engine, "asked")
    engine.scheduler._client.poll(0)
    assert engine.scheduler.reset()
    assert engine.scheduler.matched_tokens(waiting, 0) == (0, False)
    assert engine.scheduler.matched_tokens(asked, 0) == (0, False)
    engine.step(waiting)
    assert engine.leases() == 0
    assert engine.scheduler.counts["chunks_stored"] == 10, "again, under the new epoch"


def test_what_is_copied_during_a_reset_is_not_stored(engine: Engine) -> None:
    prompt = arrive(engine, "first", 160)
    assert engine.scheduler.matched_tokens(prompt, 0) == (0, False)
    plan = engine.plan(prompt)
    engine.scheduler.reset()
    engine.scheduler.on_outcome(engine.work(plan)[3])
    engine.step()
    assert "Commit" not in engine.link.kinds()
    assert engine.scheduler.counts["drops/store_outdated"] == 5
    assert engine.blocks.held == []


@pytest.mark.parametrize(("store_decode", "chunks"), [(False, 2), (True, 5)])
def test_generated_tokens_are_stored_if_that_is_wanted(
    tmp_path: Path, store_decode: bool, chunks: int
) -> None:
    engine = Engine(tmp_path / "arena", store_decode=store_decode)
    prompt = arrive(engine, "answered", 80)
    assert engine.scheduler.matched_tokens(prompt, 0) == (0, False)
    engine.scheduler.on_allocated(prompt, [prompt.blocks], 0)
    engine.step(prompt)
    while prompt.num_tokens < 160:  # a block of the answer at a time
        prompt.num_tokens, prompt.answered = prompt.num_tokens + BLOCK_TOKENS, prompt.answered + BLOCK_TOKENS
        prompt.blocks.append(next(engine.free))
        engine.step(prompt)
    assert prompt.num_prompt_tokens == 80
    assert engine.scheduler.counts["chunks_stored"] == chunks
    longer = arrive(engine, "longer", 200)
    assert engine.scheduler.matched_tokens(longer, 0) == (chunks * CHUNK_TOKENS, False)


def test_a_request_that_only_generates_is_not_looked_at_until_it_begins_anew(engine: Engine) -> None:
    prompt = arrive(engine, "first")
    engine.step(prompt)
    assert list(engine.scheduler.storing) == ["first"], "more of the prompt may come"
    prompt.num_tokens, prompt.answered = prompt.num_tokens + 1, 1
    engine.step(prompt)
    assert not engine.scheduler.storing
    engine.scheduler.on_preempted("first")
    assert engine.scheduler.matched_tokens(prompt, prompt.num_prompt_tokens)[0] == 0
    engine.scheduler.on_allocated(prompt, [prompt.blocks], 0)
    assert list(engine.scheduler.storing) == ["first"]
    engine.scheduler.on_finished("first")
    assert not engine.scheduler.storing


def test_a_load_whose_blocks_can_not_be_paired_is_told_as_failed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.run(engine.prompt("first", 160))
    prompt = arrive(engine, "second", 200)
    assert engine.scheduler.matched_tokens(prompt, 0) == (160, False)

    def broken(*_: object) -> None:
        raise IndexError("no such block")

    monkeypatch.setattr("lmconnector.scheduler.pieces", broken)
    with pytest.raises(IndexError):
        engine.scheduler.on_allocated(prompt, [prompt.blocks], 160)
    assert engine.step(prompt)[2] == set(prompt.blocks)
    assert engine.scheduler.matched_tokens(prompt, 0) == (0, False)
    engine.step()
    assert engine.leases() == 0


def test_what_was_found_in_another_arena_is_looked_up_anew(engine: Engine) -> None:
    """A slot of the same name may hold somebody else's chunk there."""
    engine.run(engine.prompt("first", 160))
    prompt = arrive(engine, "second", 200)
    engine.scheduler._client.poll(0)
    engine.gate.arena = b"another"
    assert engine.scheduler.matched_tokens(prompt, 0) == (None, False)
    assert engine.link.kinds().count("Lookup") == 3


def test_loads_of_an_arena_that_nobody_maps_are_told_as_failed(engine: Engine) -> None:
    """It was replaced after the hit was offered: vLLM counts on the load in this step, in no later one."""
    engine.run(engine.prompt("first", 160))
    prompt = arrive(engine, "second", 200)
    engine.gate.arena = b"another"
    assert engine.scheduler.matched_tokens(prompt, 0) == (None, False)
    assert engine.scheduler.matched_tokens(prompt, 0) == (160, False)
    engine.scheduler.on_allocated(prompt, [prompt.blocks], 160)
    engine.gate.arena = ARENA_ID
    plan = engine.plan(prompt)
    assert (plan.arena, plan.stores) == (b"another", [])
    assert engine.work(plan)[2] == set(prompt.blocks[:10])
    assert not engine.scheduler.take_loads().loads


def test_loads_of_two_arenas_in_a_step_are_told_as_failed(engine: Engine) -> None:
    engine.run(engine.prompt("first", 160))
    first, second = engine.prompt("second", 200), engine.prompt("third", 200)
    for prompt, arena in ((first, b"another"), (second, ARENA_ID)):
        engine.gate.arena = arena
        engine.scheduler.on_new_request(prompt)
        assert engine.scheduler.matched_tokens(prompt, 0) == (160, False)
        engine.scheduler.on_allocated(prompt, [prompt.blocks], 160)
    assert engine.work(engine.plan())[2] == {*first.blocks[:10], *second.blocks[:10]}


def test_a_hit_whose_lease_is_over_at_once_is_a_miss(engine: Engine) -> None:
    """It would be looked up again and again."""
    engine.run(engine.prompt("first", 160))
    prompt = arrive(engine, "second", 200)
    engine.link.waiting = [msgspec.structs.replace(reply, lease_ms=0) for reply in engine.link.waiting]
    assert engine.scheduler.matched_tokens(prompt, 0) == (0, False)
    assert engine.scheduler.counts["drops/lookup_answered_strangely"] == 1


def test_a_preempted_request_looks_again(engine: Engine) -> None:
    prompt = arrive(engine, "first", 200)
    assert engine.scheduler.matched_tokens(prompt, 0) == (0, False)
    engine.scheduler.on_allocated(prompt, [prompt.blocks], 0)
    engine.step(prompt)
    engine.scheduler.on_preempted("first")
    assert engine.scheduler.matched_tokens(prompt, 0) == (192, False), "its own chunks"
    engine.scheduler.on_allocated(prompt, [prompt.blocks], 192)
    assert engine.step(prompt) == (set(), set(), set())
    assert engine.link.kinds().count("Commit") == 1, "nothing is stored twice"


def test_without_slots_a_store_is_dropped_and_counted(engine: Engine) -> None:
    prompt = arrive(engine, "long", 9 * CHUNK_TOKENS)
    engine.scheduler._client.poll(0)
    engine.world.service.paused = True  # and gives no more than the eight in the stock
    for _ in range(2):
        engine.step(prompt)
        prompt.num_tokens, prompt.answered = prompt.num_tokens + 1, prompt.answered + 1
    assert engine.scheduler.counts["drops/store_no_slot"] == 1
    assert engine.scheduler.counts["chunks_stored"] == 8


def test_a_refused_commit_keeps_nothing(engine: Engine) -> None:
    prompt = arrive(engine, "first")
    plan = engine.plan(prompt)
    engine.gate.session = 12345
    engine.scheduler.on_outcome(engine.work(plan)[3])
    engine.scheduler._client.poll(0)
    assert engine.gate.heard == ["forgotten 12345"]
    assert engine.scheduler.counts["drops/commit_refused_unknown_session"] == 5
    assert engine.blocks.held == []
    engine.gate.session = engine.peer.sessions[0]
    engine.step()
    engine.step()
    reserved = engine.world.service.storage.arena.reserved
    assert sum(map(len, reserved.values())) == 8, "the stock, and none lost"


def test_what_is_told_at_the_end(engine: Engine) -> None:
    engine.step()
    engine.scheduler.close()
    assert isinstance(engine.link.asked[-1], m.Abort)
    assert not any(engine.world.service.storage.arena.reserved.values())
