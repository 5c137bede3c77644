"""What the service answers, what it refuses, and that a refusal changes nothing."""

from dataclasses import astuple

import msgspec
import pytest

from cache_server.limits import Limits
from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef, owner_of, split_slot_refs
from cache_server.protocol.messages import Code, Outcome
from cache_server.protocol.slots import holds
from kit import ARENA_ID, KIB, SLAB_BYTES, TOKEN, Peer, RefusedError, World, chain, make_service

LIMITS = Limits(
    lease_ms=1_000,
    silent_after_ms=300,
    reclaim_grace_ms=50,
    members_max=3,
    leases_per_engine_max=2,
    stock_bytes_max=64 * KIB,
    reserved_bytes_max=96 * KIB,
)


@pytest.fixture
def world() -> World:
    return make_service(limits=LIMITS)


@pytest.fixture
def peer(world: World) -> Peer:
    return Peer(world).start()


def picture(world: World) -> object:
    """All that a request could change, but what is counted and when somebody was last heard."""
    service, arena, index = world.service, world.arena, world.service.storage.index
    return (
        bytes(world.file[: world.geometry.data_at]),
        [{h: (c.ref, c.leases, c.stamp, bool(c.ticket)) for h, c in s.chunks.items()} for s in index.spaces],
        {owner: dict(slots) for owner, slots in arena.reserved.items()},
        (len(service.leases), service.leases.granted, service.leases.released, service.leases.expired),
        {name: list(engine.members) for name, engine in service.registry.engines.items()},
        len(service.registry),
    )


def refusal(world: World, request: m.Request) -> str:
    """Its code; "" if the request was not refused, and then nothing has changed."""
    before, refused = picture(world), dict(world.service.counters.refused)
    reply = world.service.handle(request, world.now_ms)
    if not isinstance(reply, m.Refused):
        return ""
    assert picture(world) == before
    assert reply.detail
    assert reply.id == request.id
    assert world.service.counters.refused == refused | {reply.code: refused.get(reply.code, 0) + 1}
    return reply.code


def lookup(peer: Peer, hashes: list[bytes], name: str = "request", epoch: int = 0) -> m.Lookup:
    return m.Lookup(id=7, session=peer.sessions[0], request=name, hashes=b"".join(hashes), epoch=epoch)


# --- register


def test_registering_tells_all_that_a_client_needs(world: World) -> None:
    peer = Peer(world)
    peer.spawn()
    registered = peer.register()
    assert registered.session > 0
    assert (registered.version, registered.boot) == (m.VERSION_MAX, world.service.boot)
    assert registered.arena.id == ARENA_ID
    assert registered.arena.capacity_bytes == 8 * SLAB_BYTES
    assert (registered.lease_ms, registered.silent_after_ms) == (1_000, 300)
    assert peer.register().session == registered.session


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"version_min": m.VERSION_MAX + 1, "version_max": m.VERSION_MAX + 1}, Code.VERSION),
        ({"version_min": 0, "version_max": m.VERSION_MIN - 1}, Code.VERSION),
        ({"layout": None}, Code.MALFORMED),
        ({"proof": "somebody.else"}, Code.NO_PROOF),
        ({"proof": f"{owner_of('engine').hex()}.nobody"}, Code.NO_PROOF),
        ({"engine": "other"}, Code.NO_PROOF),
    ],
)
def test_a_registration_is_refused(world: World, changes: dict[str, object], code: str) -> None:
    peer = Peer(world)
    peer.spawn()
    request = msgspec.structs.replace(peer.registration(), **changes)
    assert refusal(world, request) == code
    assert peer.register().session


def test_a_newer_client_speaks_our_version(world: World) -> None:
    peer = Peer(world)
    peer.spawn()
    request = msgspec.structs.replace(
        peer.registration(), version_max=m.VERSION_MAX + 5, features=("unheard of",)
    )
    registered = world.ask(request, m.Registered)
    assert (registered.version, registered.features) == (m.VERSION_MAX, ())


def test_there_are_so_many_members_and_no_more(world: World) -> None:
    peers = [Peer(world, str(n)) for n in range(4)]
    for peer in peers[:3]:
        peer.start()
    peers[3].spawn()
    assert refusal(world, peers[3].registration()) == Code.BUSY
    peers[0].unregister()
    assert peers[3].register().session


def test_a_member_is_refreshed_or_replaced_also_when_there_are_as_many_as_can_be(world: World) -> None:
    peers = [Peer(world, str(n)).start() for n in range(3)]
    assert refusal(world, peers[0].registration()) == ""
    peers[1].kill()
    peers[1].spawn()
    assert refusal(world, peers[1].registration()) == ""
    assert len(world.service.registry) == 3


def test_the_place_of_a_living_process_is_not_taken(world: World) -> None:
    """A copied configuration: both would give back what the other one writes into."""
    peer = Peer(world).start()
    slots, first = peer.reserve(1), peer.proofs[0]
    peer.spawn()
    another = peer.registration()
    reply = world.service.handle(another, world.now_ms)
    assert isinstance(reply, m.Refused)
    assert (reply.code, reply.detail) == (
        Code.BUSY,
        "engine engine, worker 0 is process 0 and lives: give each engine an engine_id of its own",
    )
    assert peer.ping().known
    assert list(peer.commit(chain(1), slots)) == [Outcome.STORED]
    world.locked.discard(first)
    assert refusal(world, another) == "", "a restart has the place as soon as the one before is dead"


@pytest.mark.parametrize(("instance", "code"), [("1", ""), ("2", Code.BUSY), ("", Code.BUSY)])
def test_no_process_joins_another_start_of_its_engine_while_one_of_that_lives(
    world: World, instance: str, code: str
) -> None:
    """Else two starts would be mixed: one's scheduler with the other one's workers."""
    peer = Peer(world, ranks=2)
    for rank in (0, 1):
        peer.spawn(rank)
    world.ask(msgspec.structs.replace(peer.registration(0), instance="1"), m.Registered)
    other = msgspec.structs.replace(peer.registration(1), instance=instance)
    assert refusal(world, other) == code
    peer.kill(0)
    assert refusal(world, other) == ""


def test_a_process_keeps_its_place_with_a_new_presence_file(world: World) -> None:
    """Somebody has removed the runtime dir's files: it has made another one, and closed the old one."""
    peer = Peer(world).start()
    session = peer.sessions[0]
    peer.kill()
    peer.spawn()
    assert peer.register().session != session


# --- who may ask what


def test_who_is_not_registered_is_told_so(world: World) -> None:
    requests: list[m.Request] = [
        m.Lookup(id=7, session=99, request="r", hashes=chain(1)[0]),
        m.Release(id=7, session=99, requests=("r",)),
        m.Reserve(id=7, session=99, count=1),
        m.Commit(id=7, session=99, hashes=b"", slots=b""),
        m.Abort(id=7, session=99, slots=b""),
        m.Unregister(id=7, session=99),
    ]
    assert [refusal(world, request) for request in requests] == [Code.UNKNOWN_SESSION] * len(requests)
    pong = world.ask(m.Ping(id=7, session=99, seq=5), m.Pong)
    assert (pong.known, pong.seq, pong.state) == (False, 5, "ready")


def test_a_request_the_service_does_not_know_is_refused(world: World) -> None:
    assert refusal(world, m.Status(id=7)) == Code.UNKNOWN_OP


def test_a_pong_tells_how_long_it_was_silent(world: World, peer: Peer) -> None:
    world.now_ms += 120
    assert peer.ping().silence_ms == 120
    world.now_ms += 30
    peer.release("nothing")
    pong = peer.ping()
    assert (pong.silence_ms, pong.known) == (30, True)


def test_an_engine_without_all_its_ranks_stores_and_finds_nothing(world: World) -> None:
    peer = Peer(world, ranks=2)
    peer.spawn(0)
    peer.register(0)
    requests: list[m.Request] = [
        lookup(peer, chain(1)),
        m.Reserve(id=7, session=peer.sessions[0], count=1),
        m.Commit(id=7, session=peer.sessions[0], hashes=b"", slots=b""),
    ]
    assert [refusal(world, request) for request in requests] == [Code.INCOMPLETE] * 3
    peer.spawn(1)
    peer.register(1)
    assert [refusal(world, request) for request in requests] == [""] * 3


def test_a_group_that_is_not_there_is_malformed(world: World, peer: Peer) -> None:
    assert refusal(world, m.Reserve(id=7, session=peer.sessions[0], count=1, group=1)) == Code.MALFORMED


# --- store and find


def test_what_was_committed_is_found_where_it_was_put(world: World, peer: Peer) -> None:
    hashes = chain(3)
    slots = peer.store(hashes)
    found = peer.lookup([*hashes, *chain(1, "more")])
    assert found.chunks == 3
    assert found.groups[0].first == 0
    assert split_slot_refs(found.groups[0].slots) == slots
    assert (found.part_offsets, found.lease_ms) == (((0,),), 1_000)
    assert all(holds(world.file, world.geometry, slot, h) for slot, h in zip(slots, hashes, strict=True))
    assert peer.lookup(chain(2, "other")).chunks == 0


def test_a_window_group_is_found_with_its_last_chunks(world: World) -> None:
    peer = Peer(world, groups=(m.Group(4096), m.Group(100, window=2))).start()
    hashes = chain(5)
    peer.store(hashes)
    peer.store(hashes[2:4], group=1)
    found = peer.lookup(hashes)
    assert found.chunks == 4
    assert [(part.first, len(part.slots) // 20) for part in found.groups] == [(0, 4), (2, 2)]
    leased = {
        chunk.hash
        for space in world.service.storage.index.spaces
        for chunk in space.chunks.values()
        if chunk.leases
    }
    assert leased == {hashes[2], hashes[3]}


def test_engines_of_one_model_share_and_others_do_not(world: World, peer: Peer) -> None:
    same = Peer(world, "same").start()
    other = Peer(world, "other", namespace=b"other").start()
    hashes = chain(2)
    peer.store(hashes)
    assert same.lookup(hashes).chunks == 2
    assert other.lookup(hashes).chunks == 0
    assert other.commit(hashes, other.reserve(2)) == bytes([Outcome.STORED] * 2)
    assert list(same.commit(hashes, same.reserve(2))) == [Outcome.EXISTS] * 2


def test_epochs_do_not_mix(world: World, peer: Peer) -> None:
    peer.store(chain(1))
    assert world.ask(lookup(peer, chain(1), epoch=1), m.Found).chunks == 0
    assert world.ask(lookup(peer, chain(1), epoch=0), m.Found).chunks == 1


def test_nobody_commits_or_aborts_what_another_has_reserved(world: World, peer: Peer) -> None:
    other = Peer(world, "other").start()
    slots = peer.reserve(2)
    assert list(other.commit(chain(2), slots)) == [Outcome.FOREIGN] * 2
    assert other.abort(slots) == 0
    assert list(peer.commit(chain(2), slots)) == [Outcome.STORED] * 2
    assert peer.abort(slots) == 0
    assert world.service.counters.foreign_slots == 2


def test_an_abort_that_names_a_slot_twice_is_answered(world: World, peer: Peer) -> None:
    slots = peer.reserve(2)
    assert peer.abort([slots[0], slots[0], slots[1]]) == 2
    assert world.arena.reserved == {}


def test_all_but_what_it_knows_of_comes_back_to_its_engine_alone(world: World, peer: Peer) -> None:
    other = Peer(world, "other").start()
    theirs, known = other.reserve(1), peer.reserve(3)
    peer.reserve(2)  # the reply was lost
    assert peer.abort([*known, *theirs], all_but=True) == 2
    assert set(world.arena.reserved[peer.owner]) == {slot.number for slot in known}
    assert len(world.arena.reserved[other.owner]) == 1
    assert peer.abort([known[0]._replace(generation=1)], all_but=True) == 3
    assert peer.abort([], all_but=True) == 0
    assert peer.owner not in world.arena.reserved


def test_slots_reserved_for_another_shape_can_only_be_given_back(world: World) -> None:
    peer = Peer(world).start()
    slots = peer.reserve(1)
    peer.groups = (m.Group(8 * KIB),)
    peer.register()
    assert list(peer.commit(chain(1), slots)) == [Outcome.FOREIGN]
    assert peer.abort(slots) == 1


# --- limits


def test_a_stock_has_its_bound_and_all_together_theirs(world: World, peer: Peer) -> None:
    other = Peer(world, "other").start()

    def asked(by: Peer, count: int) -> str:
        return refusal(world, m.Reserve(id=7, session=by.sessions[0], count=count))

    slots = peer.reserve(10)
    assert asked(peer, 17) == Code.TOO_LARGE
    assert asked(peer, 7) == Code.BUSY
    assert asked(other, 15) == Code.BUSY
    assert asked(other, 14) == ""
    assert asked(peer, 1) == Code.BUSY
    assert peer.abort(slots[:1]) == 1
    assert asked(peer, 1) == ""


def test_a_slot_larger_than_a_slab_is_too_large(world: World) -> None:
    peer = Peer(world, groups=(m.Group(SLAB_BYTES + 1),)).start()
    assert refusal(world, m.Reserve(id=7, session=peer.sessions[0], count=1)) == Code.TOO_LARGE


def test_without_room_a_reservation_is_refused(world: World, peer: Peer) -> None:
    other = Peer(world, "other", groups=(m.Group(16 * KIB),), namespace=b"big").start()
    hashes = chain(4)
    other.store(hashes)
    other.store(chain(4, "more"))
    other.lookup(hashes)
    other.lookup(chain(4, "more"), "another")
    assert refusal(world, m.Reserve(id=7, session=peer.sessions[0], count=1)) == Code.NO_SPACE
    other.release("another")
    assert len(peer.reserve(16)) == 16


def test_fresh_memory_that_is_on_its_way_is_worth_waiting_for() -> None:
    world = World(populated=False)
    peer = Peer(world).start()
    assert refusal(world, m.Reserve(id=7, session=peer.sessions[0], count=1)) == Code.BUSY
    world.arena.populated(0)
    assert len(peer.reserve(4)) == 4


def test_an_engine_has_so_many_leases_and_no_more(world: World, peer: Peer) -> None:
    peer.store(chain(3))
    peer.lookup(chain(3), "a")
    peer.lookup(chain(3), "b")
    assert refusal(world, lookup(peer, chain(3), "c")) == Code.BUSY
    assert refusal(world, lookup(peer, chain(1, "not stored"), "c")) == ""
    peer.release("a")
    assert refusal(world, lookup(peer, chain(3), "c")) == ""


def test_a_lease_is_renewed_also_when_there_are_as_many_as_can_be(world: World, peer: Peer) -> None:
    peer.store(chain(3))
    peer.lookup(chain(3), "a")
    peer.lookup(chain(3), "b")
    assert refusal(world, lookup(peer, chain(3), "a")) == ""
    assert len(world.service.leases) == 2


# --- leases


def test_a_miss_ends_the_lease_of_that_name(world: World, peer: Peer) -> None:
    peer.store(chain(1))
    peer.lookup(chain(1))
    assert len(world.service.leases) == 1
    peer.lookup(chain(1, "other"))
    assert len(world.service.leases) == 0


def test_leases_end_when_released_or_at_their_time(world: World, peer: Peer) -> None:
    peer.store(chain(2))
    peer.lookup(chain(2), "a")
    world.pass_ms(10)
    peer.lookup(chain(2), "b")
    assert peer.release("a", "a", "never granted") == 1
    world.pass_ms(999)
    assert len(world.service.leases) == 1
    world.pass_ms(1)
    assert len(world.service.leases) == 0
    leases = world.service.leases
    assert (leases.granted, leases.released, leases.expired) == (2, 1, 1)


# --- drain


def test_a_draining_server_ends_what_it_began_and_begins_nothing(world: World, peer: Peer) -> None:
    peer.store(chain(1))
    slots = peer.reserve(2)
    peer.lookup(chain(1))
    world.service.draining = True
    newcomer = Peer(world, "newcomer")
    newcomer.spawn()
    assert refusal(world, newcomer.registration()) == Code.DRAINING
    assert refusal(world, lookup(peer, chain(1))) == Code.DRAINING
    assert refusal(world, m.Reserve(id=7, session=peer.sessions[0], count=1)) == Code.DRAINING
    assert peer.ping().state == "draining"
    assert list(peer.commit(chain(1, "new"), slots[:1])) == [Outcome.STORED]
    assert peer.abort(slots[1:]) == 1
    assert peer.release("request") == 1
    peer.unregister()


# --- clear


def test_an_engine_clears_its_own_namespace(world: World, peer: Peer) -> None:
    other = Peer(world, "other", namespace=b"other").start()
    peer.store(chain(3))
    other.store(chain(2))
    peer.lookup(chain(3))
    assert peer.clear() == 3
    assert peer.lookup(chain(3), "again").chunks == 0
    assert other.lookup(chain(2)).chunks == 2
    world.pass_ms(2_000)  # the lease on what is gone ends without a trouble
    assert world.service.counters.cleared_chunks == 3


def test_the_token_clears_everything(world: World, peer: Peer) -> None:
    other = Peer(world, "other", namespace=b"other").start()
    peer.store(chain(3))
    other.store(chain(2))
    assert refusal(world, m.Clear(id=7, token="guessed")) == Code.DENIED
    assert refusal(world, m.Clear(id=7, session=peer.sessions[0], token="guessed")) == Code.DENIED
    assert refusal(world, m.Clear(id=7, session=99)) == Code.UNKNOWN_SESSION
    assert refusal(world, m.Clear(id=7)) == Code.DENIED
    assert world.ask(m.Clear(id=7, token=TOKEN), m.Done).count == 5
    assert world.arena.usage().free == world.arena.usage().capacity
    assert world.start().storage.restored == 0


def test_an_engine_that_is_not_whole_is_not_told_that_it_has_cleared(world: World) -> None:
    """Its prefix is not known before all ranks are there, so nothing of it could be found."""
    peer = Peer(world, ranks=2).start()
    peer.store(chain(2))
    world.start()
    peer.register(0)
    assert refusal(world, m.Clear(id=7, session=peer.sessions[0])) == Code.INCOMPLETE


# --- engines that leave, die and come back


def test_an_engine_that_leaves_gives_back_leases_at_once_and_slots_when_its_locks_are_free(
    world: World,
) -> None:
    peer = Peer(world, ranks=2).start()
    peer.store(chain(1))
    peer.reserve(3)
    peer.lookup(chain(1))
    peer.unregister(0)
    peer.kill(0)
    assert len(world.service.leases) == 1
    peer.unregister(1)
    assert len(world.service.leases) == 0
    assert world.pass_ms(1_000) == []
    assert len(world.arena.reserved[peer.owner]) == 3
    peer.kill(1)
    assert world.pass_ms(0) == []
    assert world.pass_ms(50) == [f"{peer.owner.hex()} (3 slots came back)"]
    assert world.arena.reserved == {}
    assert len(world.service.storage.index) == 1


def test_a_rank_that_has_not_yet_come_back_keeps_the_slots_it_may_write(world: World) -> None:
    """After a restart of the server only one of two ranks has registered, and leaves: the other one's process
    lives, as its lock proves, and may still be copying into what was reserved before."""
    peer = Peer(world, ranks=2).start()
    slots = peer.reserve(2)
    world.start()
    peer.register(0)
    peer.unregister(0)
    peer.kill(0)
    assert set(world.arena.reserved.get(peer.owner, ())) == {slot.number for slot in slots}
    peer.kill(1)
    world.pass_ms(0)
    world.pass_ms(50)
    assert world.arena.reserved == {}


def test_a_silent_engine_keeps_what_it_has(world: World, peer: Peer) -> None:
    slots = peer.reserve(2)
    assert world.pass_ms(3_600_000) == []
    assert list(peer.commit(chain(2), slots)) == [Outcome.STORED] * 2


def test_a_dead_engine_gives_back_what_it_had_after_the_grace(world: World, peer: Peer) -> None:
    other = Peer(world, "other").start()
    peer.store(chain(1))
    peer.reserve(3)
    other.reserve(2)
    peer.lookup(chain(1))
    other.lookup(chain(1))
    peer.kill()
    assert world.pass_ms(100) == []
    assert world.pass_ms(49) == []
    assert world.pass_ms(1) == ["engine (3 slots came back)"]
    assert world.pass_ms(100) == []
    assert {owner: len(slots) for owner, slots in world.arena.reserved.items()} == {other.owner: 2}
    assert world.service.leases.of("engine") == 0
    assert world.service.leases.of("other") == 1
    assert refusal(world, m.Release(id=7, session=peer.sessions[0], requests=())) == Code.UNKNOWN_SESSION
    counters = world.service.counters
    assert (counters.engines_gone, counters.reclaimed_slots) == (1, 3)
    assert other.lookup(chain(1)).chunks == 1


def test_one_living_rank_keeps_the_engines_slots(world: World) -> None:
    peer = Peer(world, ranks=2).start()
    peer.reserve(3)
    peer.kill(1)
    world.pass_ms(0)
    assert world.pass_ms(1_000) == []
    assert len(world.arena.reserved[peer.owner]) == 3
    assert refusal(world, m.Reserve(id=7, session=peer.sessions[0], count=1)) == Code.INCOMPLETE


def test_a_restarted_server_knows_slots_not_sessions(world: World, peer: Peer) -> None:
    hashes = chain(2)
    stored = peer.store(hashes)
    slots = peer.reserve(2)
    world.start()
    assert not peer.ping().known
    peer.register()
    assert list(peer.commit(chain(1, "new"), slots[:1])) == [Outcome.STORED]
    assert peer.abort(slots[1:]) == 1
    found = peer.lookup(hashes)
    assert split_slot_refs(found.groups[0].slots) == stored


def test_what_a_dead_engine_had_reserved_comes_back_after_a_restart_too(world: World, peer: Peer) -> None:
    peer.reserve(2)
    peer.kill()
    world.start()
    assert world.pass_ms(0) == []
    assert world.pass_ms(50) == [f"{peer.owner.hex()} (2 slots came back)"]
    assert world.arena.usage().free == world.arena.usage().capacity


def test_a_missing_presence_file_proves_nothing_to_a_server_that_has_never_seen_it(
    world: World, peer: Peer
) -> None:
    """Somebody tidied the runtime dir while no server ran; the process may be about to write."""
    peer.reserve(2)
    world.locked.clear()
    world.locked.known.clear()
    world.start()
    assert world.pass_ms(0) == []
    assert world.pass_ms(60_000) == []
    assert sum(map(len, world.arena.reserved.values())) == 2
    peer.spawn()
    peer.register()
    assert peer.abort([], all_but=True) == 2, "they are its own still"
    assert world.pass_ms(0) == []


def test_a_file_of_the_dead_is_kept_for_as_long_as_it_proves_something(world: World) -> None:
    engine = Peer(world, "engine", ranks=2).start()
    engine.reserve(1)
    world.locked.known.add("nobody's")
    first, second = engine.proofs.values()
    assert world.service.spent_proofs(world.locked.seen()) == ["nobody's"]
    engine.kill(0)
    assert world.service.spent_proofs(world.locked.seen()) == sorted(["nobody's", first]), "another one lives"
    engine.kill(1)
    for passed_ms in (0, 49):
        assert world.pass_ms(passed_ms) == []
        assert world.service.spent_proofs(world.locked.seen()) == ["nobody's"]
    assert world.pass_ms(1) == ["engine (1 slots came back)"]
    assert world.service.spent_proofs(world.locked.seen()) == sorted(["nobody's", first, second])


def test_a_reused_slot_has_a_new_generation(world: World, peer: Peer) -> None:
    seen: set[SlotRef] = set()
    for n in range(40):
        slots = peer.reserve(1)
        assert not seen & set(slots)
        seen |= set(slots)
        peer.commit(chain(1, str(n)), slots) if n % 2 else peer.abort(slots)
        if n % 10 == 9:
            world.start()
            peer.register()
    generations = [slot.generation for slot in seen]
    assert len(set(generations)) == len(generations)


# --- what is counted


def test_counters_tell_what_was_done(world: World, peer: Peer) -> None:
    hashes = chain(3)
    slots = peer.reserve(5)
    peer.commit(hashes[:2], slots[:2])
    peer.commit([hashes[0]], slots[2:3])
    peer.commit([hashes[2]], slots[3:4], parent=chain(1, "not stored")[0])
    peer.abort(slots[4:])
    peer.lookup(hashes)
    peer.lookup(chain(1, "not stored"), "other")
    counters = world.service.counters
    names = (
        "reserved_slots",
        "stored_chunks",
        "stored_bytes",
        "existing_chunks",
        "orphan_chunks",
        "aborted_slots",
    )
    assert [getattr(counters, name) for name in names] == [5, 2, 8 * KIB, 1, 1, 1]
    names = ("lookups", "lookup_hits", "chunks_asked", "chunks_found", "found_bytes")
    assert [getattr(counters, name) for name in names] == [2, 1, 4, 2, 8 * KIB]
    assert sum(astuple(world.arena.usage())) == 2 * world.arena.usage().capacity


def test_a_refused_request_raises_in_the_kit(world: World) -> None:
    with pytest.raises(RefusedError, match="NO_PROOF"):
        world.ask(msgspec.structs.replace(_registration(world), proof="x"), m.Registered)


def _registration(world: World) -> m.Register:
    peer = Peer(world)
    peer.spawn()
    return peer.registration()
