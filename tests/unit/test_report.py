"""The report: every byte in one place, every worker in one state."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_server import report
from cache_server.counters import BUCKETS_US
from cache_server.limits import Limits
from cache_server.protocol import messages as m
from kit import ARENA_ID, KIB, SLAB_BYTES, Peer, RefusedError, World, chain, make_service

LIMITS = Limits(silent_after_ms=300, reclaim_grace_ms=50)


@pytest.fixture
def world() -> World:
    return make_service(limits=LIMITS)


def describe(world: World) -> report.Status:
    return report.describe(world.service, world.now_ms, 42, 7, "")


def check_conservation(arena: report.ArenaReport) -> None:
    assert arena.free_bytes + arena.used_bytes + arena.quarantined_bytes == arena.capacity_bytes
    assert arena.committed_bytes + arena.stocked_bytes + arena.waste_bytes == arena.used_bytes
    assert 0 <= arena.unpopulated_bytes <= arena.free_bytes


def test_a_fresh_server_is_empty(world: World) -> None:
    status = describe(world)
    assert (status.boot, status.pid, status.uptime_s, status.state) == ("0000000000000001", 42, 7, "ready")
    assert status.arena.free_bytes == status.arena.capacity_bytes == 8 * SLAB_BYTES
    assert status.arena.id == ARENA_ID.hex()
    assert set(status.workers.values()) == {0}
    assert set(status.counters.values()) == {0}


def test_fresh_memory_is_free_but_not_populated() -> None:
    world = World(populated=False)
    world.arena.populated(0)
    arena = describe(world).arena
    assert (arena.free_bytes, arena.unpopulated_bytes) == (8 * SLAB_BYTES, 7 * SLAB_BYTES)
    check_conservation(arena)


def test_every_byte_is_in_one_place(world: World) -> None:
    peer = Peer(world, groups=(m.Group(12 * KIB),)).start()
    peer.store(chain(2))
    peer.reserve(1)
    arena = describe(world).arena
    assert (arena.committed_bytes, arena.stocked_bytes, arena.waste_bytes) == (24 * KIB, 12 * KIB, 12 * KIB)
    assert arena.free_bytes == 5 * SLAB_BYTES
    check_conservation(arena)


def test_what_a_silent_engine_has_reserved_is_quarantined_until_it_speaks(world: World) -> None:
    peer, other = Peer(world).start(), Peer(world, "other").start()
    peer.reserve(3)
    other.reserve(2)
    world.pass_ms(200)
    other.ping()
    world.pass_ms(101)
    arena = describe(world).arena
    assert (arena.stocked_bytes, arena.quarantined_bytes) == (8 * KIB, 12 * KIB)
    check_conservation(arena)
    assert describe(world).workers == {"warming": 0, "ready": 1, "silent": 1, "gone": 0}
    peer.ping()
    arena = describe(world).arena
    assert (arena.stocked_bytes, arena.quarantined_bytes) == (20 * KIB, 0)
    check_conservation(arena)


@pytest.mark.parametrize("after", ["death of a rank", "restart"])
def test_what_nobody_answers_for_is_quarantined(world: World, after: str) -> None:
    peer = Peer(world, ranks=2).start()
    peer.reserve(2)
    if after == "restart":
        world.start()
    else:
        peer.kill(1)
        world.pass_ms(0)
    arena = describe(world).arena
    assert (arena.stocked_bytes, arena.quarantined_bytes) == (0, 16 * KIB)
    check_conservation(arena)
    peer.spawn(1)
    peer.register(1)
    peer.register(0)
    assert describe(world).arena.quarantined_bytes == 0


def test_chunks_leases_and_refusals_are_counted(world: World) -> None:
    peer = Peer(world).start()
    peer.store(chain(3))
    peer.lookup(chain(3), "a")
    peer.lookup(chain(3), "b")
    peer.release("a")
    with pytest.raises(RefusedError):
        world.ask(m.Clear(id=1, token="guessed"), m.Done)
    status = describe(world)
    assert status.chunks == report.ChunkReport(stored=3, restored=0, evicted=0)
    assert status.leases == report.LeaseReport(outstanding=1, granted=2, released=1, expired=0)
    assert status.refused == {"DENIED": 1}
    assert status.counters["stored_chunks"] == 3
    assert "refused" not in status.counters
    world.start()
    assert describe(world).chunks.restored == 3


def test_latencies_have_as_many_counts_as_buckets(world: World) -> None:
    world.service.counters.observe("ping", 15)
    latency = describe(world).latency["ping"]
    assert len(latency.counts) == len(BUCKETS_US) + 1
    assert (sum(latency.counts), latency.sum_us) == (1, 15)


def test_a_draining_server_says_so(world: World) -> None:
    world.service.draining = True
    assert describe(world).state == "draining"


def test_each_worker_has_a_row(world: World) -> None:
    peer = Peer(world, ranks=2)
    for rank in (0, 1):
        peer.spawn(rank)
    peer.register(0)
    world.now_ms += 2_000
    (row,) = report.worker_rows(world.service, world.now_ms)
    assert (row.engine, row.role, row.rank, row.world, row.state) == ("engine", "worker", 0, 2, "silent")
    assert (row.registered_s, row.silent_ms, row.incomplete) == (2, 2_000, "1 of 2 workers are registered")
    peer.register(1)
    peer.ping(0)
    peer.reserve(2)
    peer.lookup(chain(1))
    rows = report.worker_rows(world.service, world.now_ms)
    assert [(row.rank, row.state, row.pings) for row in rows] == [(0, "ready", 1), (1, "ready", 0)]
    assert {row.stock_bytes for row in rows} == {16 * KIB}
    assert {row.incomplete for row in rows} == {""}


def test_a_snapshot_does_not_change_afterwards(world: World) -> None:
    status = describe(world)
    before = msgspec.json.encode(status)
    peer = Peer(world).start()
    peer.store(chain(2))
    world.service.counters.observe("commit", 3)
    world.service.counters.refuse("BUSY")
    assert msgspec.json.encode(status) == before


def test_a_status_survives_the_wire(world: World) -> None:
    Peer(world).start().store(chain(1))
    world.service.counters.observe("commit", 3)
    rows = report.worker_rows(world.service, world.now_ms)
    status = msgspec.structs.replace(describe(world), worker_rows=rows)
    assert msgspec.convert(msgspec.to_builtins(status), report.Status) == status


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["store", "reserve", "silence", "ping", "kill", "restart"]), st.integers(0, 2)
        ),
        max_size=25,
    )
)
def test_no_byte_is_ever_lost_or_counted_twice(steps: list[tuple[str, int]]) -> None:
    world = make_service(limits=LIMITS)
    sizes = (4 * KIB, 8 * KIB, 12 * KIB)
    peers = [Peer(world, str(size), (m.Group(size),), str(size).encode()).start() for size in sizes]
    for at, (act, which) in enumerate(steps):
        peer = peers[which]
        try:
            if act == "store":
                peer.store(chain(2, str(at)))
            elif act == "reserve":
                peer.reserve(1)
            elif act == "silence":
                world.pass_ms(301)
            elif act == "ping":
                peer.ping()
            elif act == "kill":
                peer.kill()
                world.pass_ms(50)
            else:
                world.start()
        except RefusedError:
            peer.start()
        check_conservation(describe(world).arena)
        assert sum(describe(world).workers.values()) == len(world.service.registry)
