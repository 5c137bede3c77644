"""Every way to be refused: the code, and that nothing has changed."""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import pytest

from cache_server.protocol import messages as m
from cache_server.protocol.codec import decode_request, encode
from cache_server.protocol.keys import owner_of, pack_slot_names
from cache_server.protocol.messages import Code
from contract.frames import hostile_frames
from contract.pair import Pair, WiredPeer, new_pair
from kit import KIB, SLAB_BYTES, chain

HASH = chain(1)[0]


@dataclass(frozen=True)
class Scenario:
    code: str
    prepare: Callable[[], tuple[Pair, m.Request | bytes]]


SCENARIOS: dict[str, Scenario] = {}


def refused(code: str):
    def register(prepare: Callable[[], tuple[Pair, m.Request | bytes]]):
        SCENARIOS[prepare.__name__] = Scenario(code, prepare)
        return prepare

    return register


def one_engine(**limits: int) -> tuple[Pair, WiredPeer]:
    """With two chunks stored, one leased and one slot reserved, so that there is something to change."""
    pair = new_pair(**limits)
    peer = WiredPeer(pair).register()
    peer.store(chain(2))
    peer.lookup(chain(2), "held")
    peer.reserve(1)
    return pair, peer


def registration(pair: Pair, **changes: object) -> m.Register:
    return msgspec.structs.replace(WiredPeer(pair, "another").registration, id=77, **changes)


@refused(Code.VERSION)
def a_client_that_is_too_new():
    pair, _ = one_engine()
    return pair, registration(pair, version_min=m.VERSION_MAX + 1, version_max=m.VERSION_MAX + 5)


@refused(Code.VERSION)
def a_client_that_is_too_old():
    pair, _ = one_engine()
    return pair, registration(pair, version_min=0, version_max=m.VERSION_MIN - 1)


@refused(Code.VERSION)
def a_client_whose_window_is_empty():
    pair, _ = one_engine()
    return pair, registration(pair, version_min=m.VERSION_MAX + 1, version_max=m.VERSION_MIN - 1)


@refused(Code.MALFORMED)
def bytes_that_are_no_message():
    pair, _ = one_engine()
    return pair, b"hello"


@refused(Code.MALFORMED)
def a_worker_without_a_layout():
    pair, _ = one_engine()
    return pair, registration(pair, layout=None)


@refused(Code.MALFORMED)
def a_reservation_for_a_group_that_is_not_there():
    pair, peer = one_engine()
    return pair, m.Reserve(id=77, session=peer.session, group=1, count=1)


@refused(Code.MALFORMED)
def a_commit_for_a_group_that_is_not_there():
    pair, peer = one_engine()
    slots = pack_slot_names(peer.reserve(1))
    return pair, m.Commit(id=77, session=peer.session, group=3, hashes=HASH, slots=slots)


@refused(Code.UNKNOWN_OP)
def an_op_of_another_protocol():
    pair, _ = one_engine()
    return pair, hostile_frames()["an op that is nobody's"]


@refused(Code.TOO_LARGE)
def a_message_that_is_too_large():
    pair, _ = one_engine()
    return pair, hostile_frames()["too many bytes"]


@refused(Code.TOO_LARGE)
def a_message_with_too_many_values():
    pair, _ = one_engine()
    return pair, hostile_frames()["too many values on two levels"]


@refused(Code.TOO_LARGE)
def a_slot_that_fits_into_no_slab():
    pair = new_pair()
    peer = WiredPeer(pair, part_bytes=SLAB_BYTES + 1).register()
    return pair, m.Reserve(id=77, session=peer.session, count=1)


@refused(Code.NO_PROOF)
def a_proof_that_nobody_holds():
    pair, _ = one_engine()
    return pair, registration(pair, proof=f"{owner_of('another').hex()}.nobody")


@refused(Code.NO_PROOF)
def the_proof_of_another_engine():
    pair, peer = one_engine()
    return pair, registration(pair, proof=peer.proof)


@refused(Code.NO_PROOF)
def a_proof_that_is_the_digest_alone():
    pair, _ = one_engine()
    return pair, registration(pair, proof=owner_of("another").hex())


def incomplete_engine() -> tuple[Pair, WiredPeer]:
    pair, _ = one_engine()
    return pair, WiredPeer(pair, "two ranks", ranks=2).register()


@refused(Code.INCOMPLETE)
def a_lookup_before_all_ranks_are_there():
    pair, peer = incomplete_engine()
    return pair, m.Lookup(id=77, session=peer.session, request="r", hashes=HASH)


@refused(Code.INCOMPLETE)
def a_reservation_before_all_ranks_are_there():
    pair, peer = incomplete_engine()
    return pair, m.Reserve(id=77, session=peer.session, count=1)


@refused(Code.INCOMPLETE)
def a_commit_before_all_ranks_are_there():
    pair, peer = incomplete_engine()
    return pair, m.Commit(id=77, session=peer.session, hashes=HASH, slots=bytes(12))


@refused(Code.INCOMPLETE)
def a_lookup_of_a_scheduler_alone():
    pair, _ = one_engine()
    request = registration(pair, role="scheduler", layout=None)
    session = pair.expect(request, m.Registered).session
    return pair, m.Lookup(id=77, session=session, request="r", hashes=HASH)


@refused(Code.INCOMPLETE)
def a_lookup_after_a_rank_has_died():
    pair = new_pair()
    peers = [WiredPeer(pair, "two ranks", rank=rank, ranks=2) for rank in (0, 1)]
    for peer in peers:
        peer.register()
    peers[0].store(chain(1))
    peers[1].die()
    pair.world.pass_ms(1)
    return pair, m.Lookup(id=77, session=peers[0].session, request="r", hashes=HASH)


@refused(Code.NO_SPACE)
def a_reservation_larger_than_the_arena():
    pair, peer = one_engine()
    return pair, m.Reserve(id=77, session=peer.session, count=4096)


@refused(Code.NO_SPACE)
def a_reservation_when_all_is_leased_or_reserved():
    pair, peer = one_engine()
    free = pair.state()[0]["arena"]["free_bytes"] // (4 * KIB)
    peer.reserve(free)
    return pair, m.Reserve(id=77, session=peer.session, count=1)


@refused(Code.BUSY)
def a_reservation_while_memory_is_populated():
    pair = new_pair(populated=False)
    peer = WiredPeer(pair).register()
    return pair, m.Reserve(id=77, session=peer.session, count=1)


@refused(Code.BUSY)
def a_stock_that_is_full():
    pair, peer = one_engine(stock_bytes_max=8 * KIB)
    peer.reserve(1)
    return pair, m.Reserve(id=77, session=peer.session, count=1)


@refused(Code.BUSY)
def the_stocks_of_all_engines_that_are_full():
    pair, peer = one_engine(reserved_bytes_max=8 * KIB)
    peer.reserve(1)
    other = WiredPeer(pair, "another").register()
    return pair, m.Reserve(id=77, session=other.session, count=1)


@refused(Code.BUSY)
def one_process_more_than_there_can_be():
    pair, _ = one_engine(members_max=1)
    return pair, registration(pair)


@refused(Code.DENIED)
def a_clear_without_anything():
    pair, _ = one_engine()
    return pair, m.Clear(id=77)


@refused(Code.DENIED)
def a_clear_with_another_token():
    pair, peer = one_engine()
    return pair, m.Clear(id=77, session=peer.session, token="thé admin's word")


def draining() -> tuple[Pair, WiredPeer]:
    pair, peer = one_engine()
    pair.service.draining = True
    return pair, peer


@refused(Code.DRAINING)
def a_registration_at_the_end():
    pair, _ = draining()
    return pair, registration(pair)


@refused(Code.DRAINING)
def a_lookup_at_the_end():
    pair, peer = draining()
    return pair, m.Lookup(id=77, session=peer.session, request="held", hashes=HASH)


@refused(Code.DRAINING)
def a_reservation_at_the_end():
    pair, peer = draining()
    return pair, m.Reserve(id=77, session=peer.session, count=1)


def stale(request_of: Callable[[int], m.Request], name: str) -> None:
    for why, session_of in STALE_SESSIONS.items():

        def prepare(session_of: Callable[[Pair, WiredPeer], int] = session_of):
            pair, peer = one_engine()
            return pair, request_of(session_of(pair, peer))

        SCENARIOS[f"{name} of {why}"] = Scenario(Code.UNKNOWN_SESSION, prepare)


def after_leaving(pair: Pair, peer: WiredPeer) -> int:
    peer.unregister()
    return peer.session


def after_another_took_its_place(pair: Pair, peer: WiredPeer) -> int:
    before = peer.session
    peer.die()
    assert WiredPeer(pair, peer.name).register().session != before
    return before


def after_its_death(pair: Pair, peer: WiredPeer) -> int:
    peer.die()
    pair.world.pass_ms(1)
    assert pair.world.pass_ms(pair.service.limits.reclaim_grace_ms) != []
    return peer.session


def after_a_restart(pair: Pair, peer: WiredPeer) -> int:
    pair.world.start()
    return peer.session


STALE_SESSIONS: dict[str, Callable[[Pair, WiredPeer], int]] = {
    "nobody": lambda pair, peer: 4711,
    "session 0": lambda pair, peer: 0,
    "one who left": after_leaving,
    "one whose place was taken": after_another_took_its_place,
    "one who died": after_its_death,
    "one who registered before the restart": after_a_restart,
}
stale(lambda session: m.Unregister(id=77, session=session), "unregister")
stale(lambda session: m.Lookup(id=77, session=session, request="r", hashes=HASH), "lookup")
stale(lambda session: m.Release(id=77, session=session, requests=("held",)), "release")
stale(lambda session: m.Reserve(id=77, session=session, count=1), "reserve")
stale(lambda session: m.Commit(id=77, session=session, hashes=HASH, slots=bytes(12)), "commit")
stale(lambda session: m.Abort(id=77, session=session, slots=bytes(12)), "abort")


@pytest.mark.parametrize("name", SCENARIOS)
def test_is_refused_and_changes_nothing(name: str):
    scenario = SCENARIOS[name]
    pair, request = scenario.prepare()
    before = pair.state()
    counted = pair.service.counters.refused.get(scenario.code, 0)
    reply = pair.send(request if isinstance(request, bytes) else encode(request))
    assert isinstance(reply, m.Refused), reply
    assert reply.code == scenario.code
    assert reply.detail
    if isinstance(request, m.Request):
        assert reply.id == 77
    assert pair.state() == before
    assert pair.service.counters.refused[scenario.code] == counted + 1


def test_every_code_is_reached():
    codes = {value for name, value in vars(Code).items() if name.isupper()}
    assert codes - {scenario.code for scenario in SCENARIOS.values()} == {Code.INTERNAL}  # see test_loop.py


@pytest.mark.parametrize("window", [(2, 9), (0, 0)])
def test_a_version_refusal_names_both_ranges(window: tuple[int, int]):
    pair, _ = one_engine()
    reply = pair.ask(registration(pair, version_min=window[0], version_max=window[1]))
    assert isinstance(reply, m.Refused)
    assert f"{m.VERSION_MIN}..{m.VERSION_MAX}" in reply.detail
    assert f"{window[0]}..{window[1]}" in reply.detail


def test_a_lookup_beyond_the_lease_limit_is_refused():
    pair, peer = one_engine(leases_per_engine_max=1)
    before = pair.state()
    reply = pair.ask(m.Lookup(id=77, session=peer.session, request="one more", hashes=b"".join(chain(2))))
    assert isinstance(reply, m.Refused)
    assert reply.code == Code.BUSY
    after = pair.state()
    for name in ("arena", "chunks", "leases", "workers"):
        assert after[0][name] == before[0][name]
    assert after[1] == before[1]


def test_a_service_refuses_what_only_the_loop_can_answer():
    """STATUS tells of things beside the service; the loop answers it."""
    pair, _ = one_engine()
    reply = pair.service.handle(decode_request(encode(m.Status(id=5))), 0)
    assert isinstance(reply, m.Refused)
    assert reply.code == Code.UNKNOWN_OP
