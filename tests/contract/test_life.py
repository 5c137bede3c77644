"""Whole lives of engines, every message as bytes: register, store, look up, load, release, leave; restart."""

import pytest

from cache_server.protocol import messages as m
from cache_server.protocol.keys import split_slot_refs
from cache_server.protocol.messages import Code, Outcome
from cache_server.protocol.slots import holds
from contract.pair import Pair, WiredPeer, content_of, new_pair
from kit import KIB, chain

PART_BYTES = 5 * KIB  # no whole number of pages: slots are longer than what is in them
PROMPT = chain(6)


def contents(hashes: list[bytes]) -> list[bytes]:
    return [content_of(hash_, PART_BYTES) for hash_ in hashes]


def balanced(pair: Pair) -> bool:
    arena = pair.state()[0]["arena"]
    return arena["free_bytes"] + arena["used_bytes"] + arena["quarantined_bytes"] == arena["capacity_bytes"]


def test_a_whole_life(pair: Pair):
    empty = pair.state()[0]["arena"]
    engine = WiredPeer(pair, part_bytes=PART_BYTES).register()
    assert engine.ping().known
    assert engine.load(PROMPT) == []
    engine.store(PROMPT[:4])
    engine.store(PROMPT[4:], parent=PROMPT[3])
    unused = engine.reserve(2)
    assert engine.load(PROMPT, "first") == contents(PROMPT)
    assert engine.load([*PROMPT[:3], *chain(2, "elsewhere")], "second") == contents(PROMPT[:3])
    assert balanced(pair)
    assert engine.release("first", "second") == 2
    assert engine.abort(unused) == 2
    engine.unregister()
    assert not engine.ping().known
    state = pair.state()[0]
    assert state["leases"] == {"outstanding": 0, "granted": 2, "released": 2, "expired": 0}
    assert state["arena"]["committed_bytes"] == 6 * 8 * KIB
    assert state["arena"]["free_bytes"] < empty["free_bytes"]
    assert balanced(pair)


def test_an_engine_of_two_ranks_stores_what_another_loads(pair: Pair):
    writers = [WiredPeer(pair, "writer", PART_BYTES, rank, ranks=2).register() for rank in (0, 1)]
    readers = [WiredPeer(pair, "reader", PART_BYTES, rank, ranks=2).register() for rank in (0, 1)]
    request = m.Reserve(id=1, session=writers[0].session, count=2)
    reserved = pair.expect(request, m.Reserved)
    slots = split_slot_refs(reserved.slots)
    for rank, offset in enumerate(reserved.part_offsets):
        for slot, hash_ in zip(slots, PROMPT, strict=False):
            at = slot.offset + offset
            pair.world.file[at : at + PART_BYTES] = content_of(bytes([rank]) + hash_, PART_BYTES)
    assert writers[1].commit(PROMPT[:2], slots) == bytes([Outcome.STORED] * 2)
    found = readers[1].lookup(PROMPT)
    assert (found.chunks, found.part_offsets[0]) == (2, reserved.part_offsets)
    for rank, offset in enumerate(found.part_offsets[0]):
        for slot, hash_ in zip(split_slot_refs(found.groups[0].slots), PROMPT, strict=False):
            assert holds(pair.world.file, pair.world.geometry, slot, hash_)
            at = slot.offset + offset
            read = bytes(pair.world.file[at : at + PART_BYTES])
            assert read == content_of(bytes([rank]) + hash_, PART_BYTES)


def test_a_restart_keeps_what_was_committed_and_forgets_who_was_there(pair: Pair):
    engine = WiredPeer(pair, part_bytes=PART_BYTES).register()
    slots = engine.store(PROMPT[:3])
    half_written = engine.reserve(2)
    engine.lookup(PROMPT, "held")
    boot = pair.service.boot
    pair.world.start()
    pong = engine.ping()
    assert not pong.known
    assert pong.boot != boot
    refusal = pair.ask(m.Release(id=1, session=engine.session, requests=("held",)))
    assert isinstance(refusal, m.Refused)
    assert refusal.code == Code.UNKNOWN_SESSION
    engine.register()
    assert engine.load(PROMPT) == contents(PROMPT[:3])
    assert all(
        holds(pair.world.file, pair.world.geometry, *each) for each in zip(slots, PROMPT, strict=False)
    )
    assert engine.commit(PROMPT[3:5], half_written, parent=PROMPT[2]) == bytes([Outcome.STORED] * 2)
    assert balanced(pair)


def test_an_engine_that_died_with_the_server_leaves_nothing_behind(pair: Pair):
    engine = WiredPeer(pair, part_bytes=PART_BYTES).register()
    engine.store(PROMPT[:3])
    engine.reserve(2)
    engine.die()
    pair.world.start()
    assert pair.state()[0]["arena"]["quarantined_bytes"] == 2 * 8 * KIB
    pair.world.pass_ms(1)
    pair.world.pass_ms(pair.service.limits.reclaim_grace_ms)
    arena = pair.state()[0]["arena"]
    assert (arena["quarantined_bytes"], arena["committed_bytes"]) == (0, 3 * 8 * KIB)


def test_a_reader_sees_that_its_slot_was_taken_away():
    """Its lease ran out, and others needed the room."""
    pair = new_pair(lease_ms=1_000)
    reader = WiredPeer(pair, "reader").register()
    slots = reader.store(PROMPT)
    reader.lookup(PROMPT)
    pair.world.pass_ms(1_000)
    writer = WiredPeer(pair, "writer").register()
    writer.store(chain(pair.world.geometry.capacity_bytes // (4 * KIB), "flood"))
    held = [holds(pair.world.file, pair.world.geometry, *each) for each in zip(slots, PROMPT, strict=True)]
    assert held == [False] * 6
    assert reader.load(PROMPT) == []


@pytest.mark.parametrize("window", [1, 2, 5])
def test_a_sliding_window_wants_only_the_end_of_a_prefix(pair: Pair, window: int):
    engine = WiredPeer(pair)
    layout = m.Layout(groups=(m.Group(4 * KIB), m.Group(4 * KIB, window=window)))
    request = m.Register(
        id=1, version_min=1, version_max=1, engine=engine.name, role="worker", namespace=b"n",
        proof=engine.proof, layout=layout,
    )  # fmt: skip
    engine.session = pair.expect(request, m.Registered).session
    engine.store(PROMPT)
    pairs = []
    for number in range(6 - window, 6):
        reserve = m.Reserve(id=1, session=engine.session, group=1, count=1)
        pairs.append((PROMPT[number], pair.expect(reserve, m.Reserved).slots))
    for hash_, slots in pairs:
        ref = split_slot_refs(slots)[0]
        names = ref.generation.to_bytes(8, "little") + ref.number.to_bytes(4, "little")
        commit = m.Commit(id=1, session=engine.session, group=1, hashes=hash_, slots=names)
        assert pair.expect(commit, m.Committed).outcomes == bytes([Outcome.STORED])
    found = engine.lookup(PROMPT)
    assert found.chunks == 6
    assert [part.first for part in found.groups] == [0, 6 - window]
