"""The worker's side: it believes the slot's entry and nobody else, and tells each copy's fate once."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from cache_server.protocol.keys import SlotRef
from cache_server.protocol.slots import clear_tables
from engine_side import LAYOUT, PAGE_BYTES, Engine, Prompt
from lmconnector.metadata import Load, Plan, Store
from lmconnector.transfer import Copy, Ticket, new_transfer
from lmconnector.worker import DEADLINE_MS, Part, WorkerSide, log
from logs import told_by


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return Engine(tmp_path / "arena", sync_load_ms=1_000)


def hit(engine: Engine, *, at_once: bool = True) -> tuple[Plan, Prompt]:
    """A step that loads what was stored."""
    engine.run(engine.prompt("first", 160))
    prompt = engine.prompt("second", 200)
    engine.scheduler.on_new_request(prompt)
    assert engine.scheduler.matched_tokens(prompt, 0) == (160, False)
    engine.scheduler.on_allocated(prompt, [prompt.blocks], 160)
    plan = engine.scheduler.take_loads()
    plan.loads[0].at_once = at_once
    return plan, prompt


def with_slot(load: Load, **change: int) -> None:
    load.pieces[-1] = load.pieces[-1]._replace(slot=load.pieces[-1].slot._replace(**change))


@pytest.mark.parametrize(
    "change", [{"generation": 9_999}, {"number": 10**9}, {"offset": 2**63}, {"offset": 1 << 40}]
)
def test_a_slot_that_is_not_what_was_promised_is_not_read(engine: Engine, change: dict[str, int]) -> None:
    plan, prompt = hit(engine)
    with_slot(plan.loads[0], **change)
    before = engine.cache.clone()
    ended, failed, bad, outcome = engine.work(plan)
    assert (ended, failed, bad) == (set(), set(), set(prompt.blocks[:10]))
    assert outcome.failed == {plan.loads[0].number}
    assert (engine.cache == before).all(), "not a byte was copied"


def test_what_changes_under_the_copy_is_cleared(engine: Engine) -> None:
    plan, prompt = hit(engine)
    checks: list[SlotRef] = []
    holds = engine.arena.holds

    def evicted_meanwhile(slot: SlotRef, hash_: bytes) -> bool:
        checks.append(slot)
        return len(checks) <= len(plan.loads[0].pieces) and holds(slot, hash_)

    engine.arena.holds = evicted_meanwhile
    _, _, bad, outcome = engine.work(plan)
    assert bad == set(prompt.blocks[:10])
    assert outcome.failed
    assert not engine.cache[prompt.blocks[:10]].any()
    assert engine.cache[prompt.blocks[10:]].all(), "the others are not touched"


@pytest.mark.parametrize("at_once", [True, False])
def test_what_is_read_from_an_arena_that_is_given_up_meanwhile_is_not_used(
    engine: Engine, *, at_once: bool
) -> None:
    """Its tables are cleared first, then its data."""
    plan, prompt = hit(engine, at_once=at_once)
    world, transfer = engine.world, engine.worker._transfer
    begin = transfer.load if at_once else transfer.load_beside

    def load(copies: Sequence[Copy]) -> Ticket:
        clear_tables(world.file, world.geometry)
        world.file[world.geometry.data_at :] = bytes(world.geometry.capacity_bytes)
        return begin(copies)

    transfer.load = transfer.load_beside = load
    ended, failed, bad, outcome = engine.work(plan)
    if not at_once:
        while not ended:
            ended, failed, _, outcome = engine.work(Plan())
    assert (ended, failed) == ((set(), set()) if at_once else ({"second"}, {"second"}))
    assert bad == (set(prompt.blocks[:10]) if at_once else set())
    assert outcome.failed == {plan.loads[0].number}
    assert engine.worker.counts["drops/load_stale"] == 1


def test_a_failed_load_beside_the_steps_is_told_by_its_request(engine: Engine) -> None:
    plan, _ = hit(engine, at_once=False)
    with_slot(plan.loads[0], generation=9_999)
    ended, failed, bad, outcome = engine.work(plan)
    assert (ended, failed, bad) == ({"second"}, {"second"}, set())
    assert outcome.failed == {plan.loads[0].number}
    assert engine.work(Plan())[:3] == (set(), set(), set()), "once"


def test_a_plan_for_another_arena_fails(engine: Engine) -> None:
    plan, prompt = hit(engine)
    plan.arena = b"another arena..."
    assert engine.work(plan)[2] == set(prompt.blocks[:10])


def test_blocks_that_the_scheduler_could_not_pair_are_recomputed(engine: Engine) -> None:
    plan = Plan(engine.arena.id, {}, [Load(7, "request", at_once=True, pieces=[], lost=(3, 4))])
    assert engine.work(plan)[2] == {3, 4}


def test_a_step_that_stands_on_a_failed_load_stores_nothing(engine: Engine) -> None:
    plan, _ = hit(engine)
    with_slot(plan.loads[0], generation=9_999)
    other = engine.prompt("other", 64, "other")
    engine.scheduler.on_new_request(other)
    engine.scheduler.add_stores(plan, [("other", 64, lambda: [other.blocks])])
    assert engine.work(plan)[3].failed == {plan.loads[0].number, plan.stores[0].number}
    engine.scheduler.on_new_request(later := engine.prompt("later", 64, "later"))
    assert not engine.work(engine.plan(later))[3].failed, "the next one does"


def test_a_slot_that_is_not_reserved_is_not_written(engine: Engine) -> None:
    plan, _ = hit(engine)
    committed = plan.loads[0].pieces[0]
    arena = engine.arena.bytes.clone()
    store = Store(99, [committed])
    outcome = engine.work(Plan(engine.arena.id, plan.part_offsets, [], [store]))[3]
    assert outcome.failed == {99}
    assert (engine.arena.bytes == arena).all()


def test_of_ranks_that_hold_the_same_one_stores_it(engine: Engine) -> None:
    prompt = engine.prompt("first", 160)
    engine.scheduler.on_new_request(prompt)
    plan = engine.plan(prompt)
    arena = engine.arena.bytes.clone()
    part = Part(0, (2 * PAGE_BYTES,), PAGE_BYTES, stores=False)
    replica = WorkerSide(new_transfer([engine.cache], LAYOUT.groups), part, lambda: engine.arena)
    replica.store(plan)
    assert replica.take_outcome().ended == {plan.stores[0].number: 1}
    assert (engine.arena.bytes == arena).all()


def test_a_worker_without_an_arena_fails_whatever_it_is_told_to_do(engine: Engine) -> None:
    plan, prompt = hit(engine)
    worker = WorkerSide(new_transfer([engine.cache], ()), Part(0, (), 0, stores=True), lambda: None)
    worker.load(plan)
    assert worker.take_bad_blocks() == set(prompt.blocks[:10])
    assert worker.take_outcome().failed == {plan.loads[0].number}


class SlowTicket:
    """Of a copy that has begun, or waits its turn, for ever."""

    def __init__(self, *, begun: bool) -> None:
        self.begun = begun
        self.over = self.cancelled = False

    def done(self) -> bool:
        return self.over or self.cancelled

    def cancel(self) -> bool:
        self.cancelled = not self.begun
        return self.cancelled

    def result(self) -> int:
        assert self.over, "nobody waits for it"
        return 7


class SlowTransfer:
    """The real one, but for its tickets."""

    def __init__(self, engine: Engine, ticket: object) -> None:
        self._real = engine.worker._transfer
        self._ticket = ticket
        engine.worker._transfer = self

    def load_beside(self, copies: Sequence[Copy]) -> object:
        self._real.load(copies)
        return self._ticket

    load = store = load_beside

    def clear(self, blocks: Sequence[int]) -> None:
        self._real.clear(blocks)


def later(engine: Engine, ms: int) -> None:
    engine.worker._clock_ns = lambda: engine.world.now_ms * 1_000_000
    engine.world.now_ms += ms


def test_a_load_that_does_not_begin_is_called_off_at_its_deadline(engine: Engine) -> None:
    plan, _ = hit(engine, at_once=False)
    ticket = SlowTicket(begun=False)
    SlowTransfer(engine, ticket)
    later(engine, 0)
    assert engine.work(plan)[:3] == (set(), set(), set())
    later(engine, DEADLINE_MS - 1)
    assert engine.work(Plan())[:3] == (set(), set(), set())
    later(engine, 1)
    ended, failed, _, outcome = engine.work(Plan())
    assert (ended, failed) == ({"second"}, {"second"})
    assert outcome.failed == {plan.loads[0].number}
    assert ticket.cancelled
    assert engine.worker.counts["drops/load_late"] == 1
    assert engine.work(Plan())[:2] == (set(), set()), "once"


def test_a_load_that_moves_bytes_is_waited_for_and_told_of(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    """Its blocks would be somebody else's while it still writes to them."""
    plan, _ = hit(engine, at_once=False)
    ticket = SlowTicket(begun=True)
    SlowTransfer(engine, ticket)
    later(engine, 0)
    engine.work(plan)
    for _ in range(10):
        later(engine, DEADLINE_MS)
        assert engine.work(Plan())[:2] == (set(), set())
    assert engine.worker.counts["copies_overdue"] == 1
    assert told_by(caplog, log) == ["load: still under way after 2000 ms, is waited for"]
    ticket.over = True
    assert engine.work(Plan())[:2] == ({"second"}, set())


def test_bad_blocks_are_known_before_the_step_is_stored(engine: Engine) -> None:
    """With a draft model vLLM asks for them first, and a copy need not be over when it was begun."""
    plan, prompt = hit(engine)
    ticket = SlowTicket(begun=True)
    SlowTransfer(engine, ticket)
    engine.worker.load(plan)
    engine.arena.holds = lambda slot, hash_: False  # the slot is another's when the copy has ended
    ticket.over = True
    assert engine.worker.take_finished_loads() == (set(), set())
    assert engine.worker.take_bad_blocks() == set(prompt.blocks[:10])
    assert engine.worker.take_outcome().failed == {plan.loads[0].number}


@pytest.mark.parametrize("begun", [False, True])
def test_the_blocks_of_a_store_are_let_go_when_it_is_called_off_and_not_before(
    engine: Engine, begun: bool
) -> None:
    prompt = engine.prompt("first", 160)
    engine.scheduler.on_new_request(prompt)
    plan = engine.plan(prompt)
    SlowTransfer(engine, SlowTicket(begun=begun))
    later(engine, 0)
    assert not engine.work(plan)[3]
    later(engine, DEADLINE_MS)
    engine.scheduler.on_outcome(engine.work(Plan())[3])
    assert bool(engine.blocks.held) is begun
    assert engine.worker.counts["drops/store_late"] == (not begun)


class BrokenTicket(SlowTicket):
    """Of a device that answers nothing but errors."""

    def done(self) -> bool:
        raise RuntimeError("an illegal memory access was encountered")

    cancel = result = done


@pytest.mark.parametrize("at_once", [True, False])
def test_a_copy_that_can_not_even_be_asked_about_has_failed(engine: Engine, at_once: bool) -> None:
    plan, prompt = hit(engine, at_once=at_once)
    SlowTransfer(engine, BrokenTicket(begun=True))
    ended, failed, bad, outcome = engine.work(plan)
    assert outcome.failed == {plan.loads[0].number}
    assert (ended, failed) == ((set(), set()) if at_once else ({"second"}, {"second"}))
    assert bad == (set(prompt.blocks[:10]) if at_once else set())
    assert engine.work(Plan())[:3] == (set(), set(), set()), "once"


def test_a_load_whose_slots_can_not_be_looked_at_again_has_failed(engine: Engine) -> None:
    plan, prompt = hit(engine)
    holds, looks = engine.arena.holds, len(plan.loads[0].pieces)

    def broken(slot: SlotRef, hash_: bytes) -> bool:
        nonlocal looks
        looks -= 1
        if looks < 0:
            raise OSError("the mapping is gone")
        return holds(slot, hash_)

    engine.arena.holds = broken
    _, _, bad, outcome = engine.work(plan)
    assert bad == set(prompt.blocks[:10])
    assert outcome.failed == {plan.loads[0].number}
    assert not engine.cache[prompt.blocks[:10]].any()


def test_what_was_copied_is_counted(engine: Engine) -> None:
    plan, _ = hit(engine)
    outcome = engine.work(plan)[3]
    assert engine.worker.counts["store_bytes"] == 10 * PAGE_BYTES
    assert engine.worker.counts["load_bytes"] == 10 * PAGE_BYTES
    assert outcome.loaded_blocks == 10
    assert not engine.work(Plan())[3], "an idle step has nothing to tell"
