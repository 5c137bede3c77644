"""What each op does, who may do it, and what happens when it is said twice."""

import msgspec
import pytest

from cache_server.protocol import messages as m
from cache_server.protocol.codec import encode
from cache_server.protocol.keys import pack_slot_names, split_slot_refs
from cache_server.protocol.messages import Code, Outcome
from cache_server.protocol.slots import holds
from contract.pair import Pair, WiredPeer, content_of, new_pair
from kit import KIB, TOKEN, chain

HASHES = chain(4)
OTHERS = chain(4, "others")


@pytest.fixture
def peer(pair: Pair) -> WiredPeer:
    return WiredPeer(pair).register()


@pytest.fixture
def stranger(pair: Pair) -> WiredPeer:
    return WiredPeer(pair, "stranger").register()


def stored(pair: Pair) -> int:
    return pair.state()[0]["chunks"]["stored"]


def stocked(pair: Pair) -> int:
    return pair.state()[0]["arena"]["stocked_bytes"]


# ---- whose slots they are ----


def test_an_engine_commits_only_its_own_slots(pair: Pair, peer: WiredPeer, stranger: WiredPeer):
    slots = peer.reserve(2)
    table = pair.state()[1]
    assert stranger.commit(HASHES[:2], slots) == bytes([Outcome.FOREIGN] * 2)
    assert (stored(pair), pair.state()[1]) == (0, table)
    assert peer.commit(HASHES[:2], slots) == bytes([Outcome.STORED] * 2)


def test_an_engine_aborts_only_its_own_slots(pair: Pair, peer: WiredPeer, stranger: WiredPeer):
    slots = peer.reserve(2)
    assert stranger.abort(slots) == 0
    assert stocked(pair) == 8 * KIB
    assert peer.abort(slots) == 2
    assert stocked(pair) == 0


def test_an_engine_releases_only_its_own_leases(pair: Pair, peer: WiredPeer, stranger: WiredPeer):
    peer.store(HASHES)
    peer.lookup(HASHES, "same name")
    assert stranger.release("same name") == 0
    assert peer.release("same name") == 1


def test_slots_that_were_never_given_are_nobodys(pair: Pair, peer: WiredPeer):
    (slot,) = peer.reserve(1)
    for wrong in (
        slot._replace(generation=slot.generation + 1),
        slot._replace(generation=0),
        slot._replace(number=slot.number + 1),
        slot._replace(number=2**32 - 1),
    ):
        assert peer.commit(HASHES[:1], [wrong]) == bytes([Outcome.FOREIGN])
        assert peer.abort([wrong]) == 0
    assert peer.abort([slot]) == 1


def test_a_slot_given_again_has_another_name(pair: Pair, peer: WiredPeer):
    (before,) = peer.reserve(1)
    peer.abort([before])
    (after,) = peer.reserve(1)
    assert (after.number, after.offset) == (before.number, before.offset)
    assert after.generation > before.generation
    assert peer.commit(HASHES[:1], [before]) == bytes([Outcome.FOREIGN])
    assert peer.commit(HASHES[:1], [after]) == bytes([Outcome.STORED])


def test_a_slot_of_another_size_is_not_taken(pair: Pair):
    groups = (m.Group(4 * KIB), m.Group(8 * KIB))
    peer = WiredPeer(pair)
    registration = msgspec.structs.replace(peer.registration, layout=m.Layout(groups=groups))
    peer.session = pair.expect(registration, m.Registered).session
    slots = pack_slot_names(peer.reserve(1))  # of group 0
    request = m.Commit(id=1, session=peer.session, group=1, hashes=HASHES[0], slots=slots)
    assert pair.expect(request, m.Committed).outcomes == bytes([Outcome.FOREIGN])


# ---- COMMIT ----


def test_a_commit_said_twice_changes_nothing_the_second_time(pair: Pair, peer: WiredPeer):
    slots = peer.reserve(2)
    assert peer.commit(HASHES[:2], slots) == bytes([Outcome.STORED] * 2)
    table = pair.state()[1]
    assert peer.commit(HASHES[:2], slots) == bytes([Outcome.FOREIGN] * 2)
    assert pair.state()[1] == table
    assert stored(pair) == 2


def test_a_key_keeps_its_first_slot(pair: Pair, peer: WiredPeer, stranger: WiredPeer):
    first = peer.store(HASHES[:2])
    assert stranger.commit(HASHES[:2], stranger.reserve(2)) == bytes([Outcome.EXISTS] * 2)
    assert stocked(pair) == 0, "the second slots went back"
    assert split_slot_refs(stranger.lookup(HASHES[:2]).groups[0].slots) == first


def test_a_chunk_without_its_parent_is_not_stored(pair: Pair, peer: WiredPeer):
    assert peer.commit(HASHES[1:3], peer.reserve(2), parent=HASHES[0]) == bytes([Outcome.ORPHAN] * 2)
    assert (stored(pair), stocked(pair)) == (0, 0)
    peer.store(HASHES[:1])
    peer.store(HASHES[1:3], parent=HASHES[0])
    assert peer.lookup(HASHES).chunks == 3


def test_outcomes_come_in_the_order_of_the_chunks(pair: Pair, peer: WiredPeer, stranger: WiredPeer):
    peer.store(HASHES[:1])
    mine, foreign = peer.reserve(3), stranger.reserve(1)
    slots = [mine[0], mine[1], foreign[0], mine[2]]
    outcomes = [Outcome.EXISTS, Outcome.STORED, Outcome.FOREIGN, Outcome.ORPHAN]
    assert peer.commit(HASHES, slots) == bytes(outcomes)


def test_one_slot_takes_one_chunk(pair: Pair, peer: WiredPeer):
    (slot,) = peer.reserve(1)
    assert peer.commit(HASHES[:2], [slot, slot]) == bytes([Outcome.STORED, Outcome.FOREIGN])


def test_one_chunk_takes_one_slot(pair: Pair, peer: WiredPeer):
    outcomes = peer.commit([HASHES[0], HASHES[0]], peer.reserve(2))
    assert outcomes == bytes([Outcome.STORED, Outcome.EXISTS])
    assert stocked(pair) == 0


def test_a_chunk_that_is_its_own_parent_is_an_orphan(pair: Pair, peer: WiredPeer):
    assert peer.commit(HASHES[:1], peer.reserve(1), parent=HASHES[0]) == bytes([Outcome.ORPHAN])


def test_an_empty_commit_has_no_outcomes(peer: WiredPeer):
    assert peer.commit([], []) == b""


# ---- ABORT, RELEASE, LOOKUP ----


def test_an_abort_said_twice_lets_nothing_go_the_second_time(pair: Pair, peer: WiredPeer):
    slots = peer.reserve(3)
    assert (peer.abort(slots[:2]), peer.abort(slots[:2]), peer.abort(slots)) == (2, 0, 1)
    assert peer.abort([]) == 0


def test_a_committed_slot_is_not_aborted(pair: Pair, peer: WiredPeer):
    slots = peer.store(HASHES[:1])
    assert peer.abort(slots) == 0
    assert peer.lookup(HASHES[:1]).chunks == 1


def test_a_slot_named_twice_in_one_abort_goes_back_once(pair: Pair, peer: WiredPeer):
    first, second = peer.reserve(2)
    assert peer.abort([first, first, second]) == 2


def test_release_counts_what_it_let_go(pair: Pair, peer: WiredPeer):
    peer.store(HASHES)
    for name in ("a", "b"):
        peer.lookup(HASHES, name)
    assert peer.release("a", "a", "nobody", "b") == 2
    assert peer.release("a", "b") == 0
    assert peer.release() == 0


def test_a_lookup_of_the_same_name_takes_the_place_of_the_one_before(pair: Pair, peer: WiredPeer):
    peer.store(HASHES)
    for _ in range(3):
        assert peer.lookup(HASHES, "name").chunks == 4
    assert pair.state()[0]["leases"]["outstanding"] == 1
    assert peer.lookup(OTHERS, "name").chunks == 0  # a miss holds nothing
    assert pair.state()[0]["leases"]["outstanding"] == 0


def test_a_lookup_answers_the_longest_prefix_and_where_its_parts_lie(pair: Pair, peer: WiredPeer):
    slots = peer.store(HASHES[:3])
    found = peer.lookup([*HASHES[:3], OTHERS[3]])
    assert (found.chunks, found.part_offsets, found.lease_ms) == (3, ((0,),), pair.service.limits.lease_ms)
    assert found.groups == (m.Part(0, found.groups[0].slots),)
    assert split_slot_refs(found.groups[0].slots) == slots


def test_a_lookup_of_nothing_finds_nothing(peer: WiredPeer):
    assert peer.lookup([]) == m.Found(id=1, boot=peer.pair.service.boot, chunks=0)


def test_a_lease_ends_by_itself(pair: Pair, peer: WiredPeer):
    peer.store(HASHES)
    peer.lookup(HASHES)
    pair.world.pass_ms(pair.service.limits.lease_ms - 1)
    assert pair.state()[0]["leases"]["outstanding"] == 1
    pair.world.pass_ms(1)
    assert pair.state()[0]["leases"]["outstanding"] == 0
    assert peer.release("request") == 0


def test_what_is_leased_stays_while_others_need_room(pair: Pair, peer: WiredPeer, stranger: WiredPeer):
    slots = peer.store(HASHES)
    peer.lookup(HASHES)
    room = pair.state()[0]["arena"]["free_bytes"] // (4 * KIB)
    stranger.store(chain(room, "fills it"))
    reply = pair.ask(m.Reserve(id=2, session=stranger.session, count=room + 1))
    assert isinstance(reply, m.Refused)
    assert reply.code == Code.NO_SPACE
    assert [peer.read(slot, hash_) for slot, hash_ in zip(slots, HASHES, strict=True)]


def test_a_lookup_refused_for_its_lease_is_no_traffic():
    pair = new_pair(leases_per_engine_max=1)
    peer = WiredPeer(pair).register()
    peer.store(HASHES)
    peer.lookup(HASHES, "first")
    pair.ask(m.Lookup(id=1, session=peer.session, request="second", hashes=HASHES[0]))
    assert pair.service.counters.lookups == 1


def test_at_its_lease_limit_an_engine_can_still_renew_a_lease():
    pair = new_pair(leases_per_engine_max=1)
    peer = WiredPeer(pair).register()
    peer.store(HASHES)
    peer.lookup(HASHES, "first")
    assert peer.lookup(HASHES, "first").chunks == 4


# ---- namespaces, epochs, CLEAR ----


@pytest.mark.parametrize("difference", ["namespace", "part bytes", "window", "groups"])
def test_engines_whose_bytes_differ_share_nothing(pair: Pair, peer: WiredPeer, difference: str):
    peer.store(HASHES)
    other = WiredPeer(pair, "other")
    changes = {
        "namespace": {"namespace": b"another model"},
        "part bytes": {"layout": m.Layout(groups=(m.Group(4 * KIB - 1),))},
        "window": {"layout": m.Layout(groups=(m.Group(4 * KIB, window=1),))},
        "groups": {"layout": m.Layout(groups=(m.Group(4 * KIB), m.Group(4 * KIB)))},
    }[difference]
    other.registration = msgspec.structs.replace(other.registration, **changes)
    assert other.register().lookup(HASHES).chunks == 0


def test_engines_of_one_namespace_share(pair: Pair, peer: WiredPeer, stranger: WiredPeer):
    peer.store(HASHES)
    assert stranger.load(HASHES) == [content_of(hash_, 4 * KIB) for hash_ in HASHES]


def test_an_epoch_is_a_namespace_of_its_own(pair: Pair, peer: WiredPeer):
    peer.store(HASHES)
    request = m.Lookup(id=1, session=peer.session, request="r", hashes=b"".join(HASHES), epoch=1)
    assert pair.expect(request, m.Found).chunks == 0


def test_a_session_clears_its_own_namespace(pair: Pair, peer: WiredPeer):
    other = WiredPeer(pair, "other")
    other.registration = msgspec.structs.replace(other.registration, namespace=b"another model")
    other.register().store(OTHERS)
    peer.store(HASHES)
    assert peer.clear() == 4
    assert (peer.lookup(HASHES).chunks, other.lookup(OTHERS).chunks) == (0, 4)
    assert peer.clear() == 0


def test_a_session_clears_one_epoch(pair: Pair, peer: WiredPeer):
    peer.store(HASHES)
    assert pair.expect(m.Clear(id=1, session=peer.session, epoch=1), m.Done).count == 0
    assert pair.expect(m.Clear(id=1, session=peer.session, epoch=0), m.Done).count == 4


@pytest.mark.parametrize("session", [0, 4711])
def test_the_token_clears_everything(pair: Pair, peer: WiredPeer, session: int):
    slots = peer.store(HASHES)
    peer.lookup(HASHES)  # leased or not
    assert pair.expect(m.Clear(id=1, session=session, token=TOKEN), m.Done).count == 4
    assert stored(pair) == 0
    file, geometry = pair.world.file, pair.world.geometry
    assert not any(holds(file, geometry, slot, hash_) for slot, hash_ in zip(slots, HASHES, strict=True))


def test_clear_leaves_what_is_being_written(pair: Pair, peer: WiredPeer):
    slots = peer.reserve(1)
    assert peer.clear() == 0
    assert peer.commit(HASHES[:1], slots) == bytes([Outcome.STORED])


def test_an_incomplete_engine_is_not_told_that_it_has_cleared(pair: Pair):
    ranks = [WiredPeer(pair, "two ranks", rank=rank, ranks=2).register() for rank in (0, 1)]
    ranks[0].store(HASHES)
    ranks[1].die()
    pair.world.pass_ms(1)
    reply = pair.ask(m.Clear(id=1, session=ranks[0].session))
    assert isinstance(reply, m.Refused)
    assert reply.code == Code.INCOMPLETE


# ---- REGISTER, UNREGISTER, PING ----


def test_the_same_registration_again_keeps_its_session(pair: Pair, peer: WiredPeer):
    before = peer.session
    slots = peer.reserve(1)
    assert peer.register().session == before
    assert peer.commit(HASHES[:1], slots) == bytes([Outcome.STORED])


@pytest.mark.parametrize(
    "changes", [{"namespace": b"other"}, {"world": 2}, {"layout": m.Layout(groups=(m.Group(8 * KIB),))}]
)
def test_another_registration_takes_the_place(pair: Pair, peer: WiredPeer, changes: dict):
    registered = pair.expect(msgspec.structs.replace(peer.registration, **changes), m.Registered)
    assert registered.session != peer.session
    assert not peer.ping().known


def test_registered_tells_what_a_client_needs(pair: Pair):
    registered = pair.expect(WiredPeer(pair).registration, m.Registered)
    assert registered.arena == pair.service.identity.arena
    assert registered.lease_ms == pair.service.limits.lease_ms
    assert registered.silent_after_ms == pair.service.limits.silent_after_ms


def test_a_registration_again_is_no_growth():
    pair = new_pair(members_max=1)
    peer = WiredPeer(pair).register()
    assert isinstance(pair.ask(peer.registration), m.Registered)


def test_unregistering_ends_leases_at_once_and_reservations_with_the_lock(pair: Pair, peer: WiredPeer):
    peer.store(HASHES)
    peer.lookup(HASHES)
    peer.reserve(2)
    peer.unregister()
    state = pair.state()[0]
    assert (state["leases"]["outstanding"], state["arena"]["quarantined_bytes"]) == (0, 8 * KIB)
    peer.die()
    pair.world.pass_ms(1)
    pair.world.pass_ms(pair.service.limits.reclaim_grace_ms)
    arena = pair.state()[0]["arena"]
    assert (arena["stocked_bytes"], arena["quarantined_bytes"]) == (0, 0)
    assert arena["committed_bytes"] == 16 * KIB


def test_unregistering_one_rank_leaves_the_others_slots(pair: Pair):
    ranks = [WiredPeer(pair, "two ranks", rank=rank, ranks=2).register() for rank in (0, 1)]
    slots = ranks[0].reserve(1)
    ranks[1].unregister()
    assert ranks[0].abort(slots) == 1


def test_what_a_live_process_may_still_write_is_given_to_nobody(pair: Pair, peer: WiredPeer):
    """Another one that says it is the same rank gets neither its place nor its slots."""
    slots = peer.reserve(1)
    reply = pair.ask(WiredPeer(pair, peer.name).registration)
    assert isinstance(reply, m.Refused)
    assert reply.code == m.Code.BUSY
    other = WiredPeer(pair, "other").register()
    assert other.reserve(1)[0].number != slots[0].number


def test_a_dead_engines_slots_come_back_after_the_grace(pair: Pair, peer: WiredPeer):
    peer.store(HASHES)
    peer.lookup(HASHES)
    peer.reserve(2)
    peer.die()
    pair.world.pass_ms(1)
    assert pair.state()[0]["arena"]["quarantined_bytes"] == 8 * KIB
    assert pair.world.pass_ms(pair.service.limits.reclaim_grace_ms) != []
    state = pair.state()[0]
    assert state["arena"]["quarantined_bytes"] == 0
    assert state["leases"]["outstanding"] == 0


def test_a_silent_engines_slots_are_kept_for_it(pair: Pair, peer: WiredPeer, stranger: WiredPeer):
    slots = peer.reserve(2)
    pair.world.pass_ms(pair.service.limits.silent_after_ms + 1)
    stranger.ping()
    assert pair.state()[0]["arena"]["quarantined_bytes"] == 8 * KIB
    assert peer.commit(HASHES[:2], slots) == bytes([Outcome.STORED] * 2)
    assert pair.state()[0]["arena"]["quarantined_bytes"] == 0


def test_a_ping_is_answered_whoever_asks(pair: Pair, peer: WiredPeer):
    for session, known in ((peer.session, True), (0, False), (4711, False)):
        pong = pair.expect(m.Ping(id=9, session=session, seq=12), m.Pong)
        assert (pong.seq, pong.known, pong.state) == (12, known, "ready")


def test_a_pong_tells_how_long_this_member_was_not_heard(pair: Pair, peer: WiredPeer):
    pair.world.pass_ms(700)
    peer.lookup(HASHES)  # is heard, but is no ping
    assert peer.ping().silence_ms == 700
    pair.world.pass_ms(30)
    assert peer.ping().silence_ms == 30


def test_a_draining_server_says_so_and_lets_work_in_flight_end(pair: Pair, peer: WiredPeer):
    peer.store(HASHES[:1])
    peer.lookup(HASHES[:1], "held")
    slots = peer.reserve(2)
    pair.service.draining = True
    assert peer.ping().state == "draining"
    assert peer.commit(HASHES[1:2], slots[:1], parent=HASHES[0]) == bytes([Outcome.STORED])
    assert peer.abort(slots[1:]) == 1
    assert peer.release("held") == 1
    peer.unregister()


# ---- STATUS ----


def test_status_tells_of_the_arena_and_of_the_workers(pair: Pair, peer: WiredPeer):
    peer.store(HASHES)
    reply = pair.expect(m.Status(id=1, workers=True), m.StatusReply)
    arena = reply.status["arena"]
    assert arena["free_bytes"] + arena["used_bytes"] + arena["quarantined_bytes"] == arena["capacity_bytes"]
    assert [row["engine"] for row in reply.status["worker_rows"]] == [peer.name]
    assert not pair.expect(m.Status(id=1), m.StatusReply).status["worker_rows"]


def test_the_status_of_as_many_workers_as_there_can_be_can_be_read(pair: Pair):
    for number in range(pair.service.limits.members_max):
        WiredPeer(pair, f"engine {number}").register()
    request = m.Status(id=1, workers=True)
    assert pair.send(encode(request)).id == 1
