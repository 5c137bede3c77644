"""The registry: who is who, who can be heard, who is gone, and when an engine is whole."""

from itertools import count

import msgspec
import pytest

from cache_server.protocol import messages as m
from cache_server.protocol.keys import key_prefix, owner_of
from cache_server.workers import Engine, GroupShape, Member, Registry, WorkerState

SILENT_AFTER_MS = 100
GRACE_MS = 50


@pytest.fixture
def registry() -> Registry:
    sessions = count(1)
    return Registry(lambda: next(sessions))


def worker(
    engine: str = "engine",
    rank: int = 0,
    world: int = 1,
    life: int = 1,
    part_bytes: int = 5000,
    **changes: object,
) -> m.Register:
    layout = m.Layout(groups=(m.Group(part_bytes),), part=rank, parts=world)
    register = m.Register(
        id=1, version_min=1, version_max=1, engine=engine, role="worker", rank=rank, world=world,
        namespace=b"model", proof=f"{owner_of(engine).hex()}.{rank}.{life}", phase="ready", layout=layout,
    )  # fmt: skip
    return msgspec.structs.replace(register, **changes)


def two_groups(part: int, parts: int, *groups: m.Group) -> m.Layout:
    return m.Layout(groups=groups, part=part, parts=parts)


def engine_of(registry: Registry, member: Member) -> Engine:
    found = registry.member(member.session)
    assert found is not None
    return found[0]


def locks(*registrations: m.Register) -> frozenset[str]:
    return frozenset(each.proof for each in registrations)


# --- register and unregister


def test_the_same_process_again_keeps_its_session(registry: Registry) -> None:
    member = registry.register(worker(phase="warming"), 0)
    again = registry.register(worker(phase="ready"), 70)
    assert again is member
    assert (member.phase, member.heard_ms, member.registered_ms) == ("ready", 70, 0)
    assert len(registry) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"proof": f"{owner_of('engine').hex()}.0.2"},
        {"namespace": b"another model"},
        {"world": 2},
        {"layout": m.Layout(groups=(m.Group(9000),))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_anything_else_takes_its_predecessors_place(registry: Registry, changes: dict[str, object]) -> None:
    old = registry.register(worker(), 0)
    new = registry.register(worker(**changes), 1)
    assert new.session != old.session
    assert registry.member(old.session) is None
    assert engine_of(registry, new).members == {("worker", 0): new}
    assert len(registry) == 1


def test_ranks_and_roles_are_members_of_one_engine(registry: Registry) -> None:
    first = registry.register(worker(rank=0, world=2), 0)
    second = registry.register(worker(rank=1, world=2), 0)
    scheduler = registry.register(worker(role="scheduler", layout=None, life=9), 0)
    assert len(registry) == 3
    assert len(registry.engines) == 1
    assert engine_of(registry, scheduler) is engine_of(registry, first) is engine_of(registry, second)
    assert registry.unregister(first.session) is None
    assert registry.unregister(scheduler.session) is None
    left = registry.unregister(second.session)
    assert left is not None
    assert left.name == "engine"
    assert registry.engines == {}
    assert len(registry) == 0
    assert registry.member(second.session) is None


# --- when an engine is whole


def test_an_engine_is_whole_with_its_last_rank(registry: Registry) -> None:
    engine = engine_of(registry, registry.register(worker(rank=1, world=2, part_bytes=9000), 0))
    assert engine.incomplete == "1 of 2 workers are registered"
    assert engine.shapes == ()
    registry.register(worker(rank=0, world=2, part_bytes=5000), 0)
    assert engine.incomplete == ""
    assert engine.shapes == (GroupShape((5000, 9000), (0, 8192), 8192 + 12288, 0),)
    assert engine.namespace == b"model"


def test_ranks_with_equal_parts_share_one(registry: Registry) -> None:
    layout = two_groups(0, 1, m.Group(4096), m.Group(100, window=3))
    registry.register(worker(rank=0, world=2, layout=layout), 0)
    engine = engine_of(registry, registry.register(worker(rank=1, world=2, layout=layout), 0))
    assert engine.shapes == (GroupShape((4096,), (0,), 4096, 0), GroupShape((100,), (0,), 4096, 3))


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        ({"namespace": b"one"}, {"namespace": b"two"}, "differ in namespace"),
        ({"world": 2}, {"world": 3}, "differ in namespace or world size"),
        (
            {"layout": two_groups(0, 1, m.Group(4096))},
            {"layout": two_groups(0, 1, m.Group(8192))},
            "share a part differ",
        ),
        (
            {"layout": two_groups(0, 2, m.Group(4096))},
            {"layout": two_groups(1, 2, m.Group(4096, window=2))},
            "differ in their cache groups",
        ),
        (
            {"layout": two_groups(0, 2, m.Group(4096))},
            {"layout": two_groups(1, 2, m.Group(4096), m.Group(4096))},
            "differ in their cache groups",
        ),
        (
            {"layout": two_groups(0, 2, m.Group(4096))},
            {"layout": two_groups(0, 2, m.Group(4096))},
            "hold 1 of 2 parts",
        ),
    ],
)
def test_ranks_that_disagree_make_no_engine(
    registry: Registry, first: dict[str, object], second: dict[str, object], why: str
) -> None:
    registry.register(worker(rank=0, **{"world": 2, **first}), 0)
    engine = engine_of(registry, registry.register(worker(rank=1, **{"world": 2, **second}), 0))
    assert why in engine.incomplete
    assert engine.shapes == ()


def test_only_workers_make_an_engine_whole(registry: Registry) -> None:
    engine = engine_of(registry, registry.register(worker(role="scheduler", layout=None), 0))
    assert engine.incomplete == "0 of 1 workers are registered"
    registry.register(worker(life=2), 0)
    assert engine.incomplete == ""


def test_a_leaving_rank_leaves_the_engine_incomplete(registry: Registry) -> None:
    first = registry.register(worker(rank=0, world=2), 0)
    second = registry.register(worker(rank=1, world=2), 0)
    engine = engine_of(registry, first)
    assert engine.incomplete == ""
    registry.unregister(second.session)
    assert engine.incomplete == "1 of 2 workers are registered"


def test_the_prefix_covers_namespace_epoch_and_every_part(registry: Registry) -> None:
    engine = engine_of(registry, registry.register(worker(), 0))
    assert engine.prefix(0) == key_prefix(b"model", 0, [(0, 5000)])
    prefixes = {engine.prefix(0), engine.prefix(1)}
    registry.register(worker(namespace=b"other"), 0)
    prefixes.add(engine.prefix(0))
    registry.register(worker(part_bytes=5001), 0)  # as many pages, but other bytes in them
    prefixes.add(engine.prefix(0))
    registry.register(worker(layout=two_groups(0, 1, m.Group(5000, window=1))), 0)
    prefixes.add(engine.prefix(0))
    assert len(prefixes) == 5
    registry.register(worker(), 0)
    assert engine.prefix(0) == key_prefix(b"model", 0, [(0, 5000)])


# --- who can be heard


def test_a_worker_warms_up_for_as_long_as_it_likes(registry: Registry) -> None:
    member = registry.register(worker(phase="warming"), 0)
    assert member.state(3_600_000, SILENT_AFTER_MS) is WorkerState.WARMING


def test_a_worker_is_ready_then_silent_then_ready_again(registry: Registry) -> None:
    member = registry.register(worker(), 0)
    assert member.state(SILENT_AFTER_MS, SILENT_AFTER_MS) is WorkerState.READY
    assert member.state(SILENT_AFTER_MS + 1, SILENT_AFTER_MS) is WorkerState.SILENT
    member.heard_ms = 200
    assert member.state(200, SILENT_AFTER_MS) is WorkerState.READY


def test_a_worker_that_pings_while_warming_can_fall_silent(registry: Registry) -> None:
    member = registry.register(worker(phase="warming"), 0)
    member.pings = 1
    assert member.state(SILENT_AFTER_MS, SILENT_AFTER_MS) is WorkerState.WARMING
    assert member.state(SILENT_AFTER_MS + 1, SILENT_AFTER_MS) is WorkerState.SILENT


# --- who is gone


def test_only_the_lock_tells_that_a_process_is_gone(registry: Registry) -> None:
    first, second = worker(rank=0, world=2), worker(rank=1, world=2)
    member = registry.register(first, 0)
    other = registry.register(second, 0)
    engine = engine_of(registry, member)
    registry.observe(locks(first, second), 1_000)
    assert member.state(10_000, SILENT_AFTER_MS) is WorkerState.SILENT
    registry.observe(locks(second), 1_000)
    assert member.state(0, SILENT_AFTER_MS) is WorkerState.GONE
    assert other.state(0, SILENT_AFTER_MS) is WorkerState.READY
    assert engine.incomplete == "1 of 2 workers are registered"
    registry.register(worker(rank=0, world=2, life=2), 0)
    assert engine.incomplete == ""


def test_a_start_with_fewer_processes_has_no_use_for_the_last_ones_places(registry: Registry) -> None:
    old = [worker(rank=rank, world=2, instance="old") for rank in (0, 1)]
    for each in old:
        registry.register(each, 0)
    registry.observe(frozenset(), 1_000)
    member = registry.register(worker(rank=0, world=1, life=2, instance="new"), 2_000)
    engine = engine_of(registry, member)
    assert [each.state(2_000, SILENT_AFTER_MS) for each in engine.members.values()] == [WorkerState.READY]
    assert engine.incomplete == ""
    assert len(registry) == 1


def test_a_process_that_registers_again_with_its_lock_is_alive(registry: Registry) -> None:
    """Its lock was free for a moment: a container whose first process always has the same pid has restarted,
    or somebody has tidied the runtime dir."""
    member = registry.register(worker(), 0)
    registry.observe(frozenset(), 1_000)
    again = registry.register(worker(), 1)
    assert again.state(1, SILENT_AFTER_MS) is WorkerState.READY
    assert engine_of(registry, again).incomplete == ""
    assert len(registry) == 1
    assert member.registration == again.registration


def test_an_owner_is_dead_when_all_its_locks_have_been_free_for_the_grace(registry: Registry) -> None:
    first, second = worker(rank=0, world=2), worker(rank=1, world=2)
    owners = {owner_of("engine")}

    def dead(locked: frozenset[str], now_ms: int) -> list[bytes]:
        return registry.dead_owners(owners, locked, now_ms, GRACE_MS)

    assert dead(locks(first, second), 0) == []
    assert dead(locks(second), 1_000) == []
    assert dead(locks(), 2_000) == []
    assert dead(locks(), 2_000 + GRACE_MS - 1) == []
    assert dead(locks(), 2_000 + GRACE_MS) == [owner_of("engine")]


def test_the_grace_begins_anew_when_a_lock_is_held_again(registry: Registry) -> None:
    owners = {owner_of("engine")}
    for now_ms, locked in ((0, locks()), (40, locks(worker())), (60, locks()), (100, locks())):
        assert registry.dead_owners(owners, locked, now_ms, GRACE_MS) == []
    assert registry.dead_owners(owners, locks(), 110, GRACE_MS) == [owner_of("engine")]


def test_owners_that_never_registered_here_are_judged_too(registry: Registry) -> None:
    """After a restart the table names them, and nobody else does."""
    orphan, living = owner_of("orphan"), owner_of("living")
    locked = locks(worker("living"))
    assert registry.dead_owners({orphan, living}, locked, 0, GRACE_MS) == []
    assert registry.dead_owners({orphan, living}, locked, GRACE_MS, GRACE_MS) == [orphan]
    assert registry.remove(orphan) is None


def test_no_grace_means_at_once(registry: Registry) -> None:
    assert registry.dead_owners({owner_of("engine")}, frozenset(), 5, 0) == [owner_of("engine")]


def test_a_removed_engine_is_unknown_with_all_its_sessions(registry: Registry) -> None:
    first = registry.register(worker(rank=0, world=2), 0)
    second = registry.register(worker(rank=1, world=2), 0)
    other = registry.register(worker("other"), 0)
    engine = registry.remove(owner_of("engine"))
    assert engine is not None
    assert engine.name == "engine"
    assert registry.member(first.session) is None
    assert registry.member(second.session) is None
    assert registry.member(other.session) is not None
    assert list(registry.engines) == ["other"]
