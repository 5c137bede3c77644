"""Bytes through the relay's rules: none is changed without a rule, and each rule does what it says."""

from itertools import pairwise
from random import Random

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError, decode_request, encode
from chaos.campaign.wire import CLEAN, GREETING_BYTES, LONG, MORE, Flow, Kind, Piece, Rules, Zmtp, treat

GREETING = bytes(range(GREETING_BYTES))
READY = b"\x04\x05READY"
PING = encode(m.Ping(id=1))


def frame(content: bytes, flags: int = 0) -> bytes:
    if len(content) > 255:
        return bytes([flags | LONG]) + len(content).to_bytes(8, "big") + content
    return bytes([flags, len(content)]) + content


MESSAGES = st.lists(st.lists(st.binary(max_size=600), min_size=1, max_size=3), max_size=6)


def message(frames: list[bytes]) -> bytes:
    *begun, last = frames
    return b"".join([*(frame(each, MORE) for each in begun), frame(last)])


def parts(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[begin:end] for begin, end in pairwise(at)]


@given(MESSAGES, st.lists(st.integers(min_value=0), max_size=20))
@example([[bytes(300), bytes(70_000)], [b"x"]], [100, 200, 70_000])
def test_a_stream_is_cut_into_its_messages_however_it_comes(sent: list[list[bytes]], cuts: list[int]) -> None:
    whole = [message(frames) for frames in sent]
    stream = GREETING + READY + b"".join(whole)
    zmtp = Zmtp()
    pieces = [piece for part in parts(stream, cuts) for piece in zmtp.feed(part)]
    assert b"".join(piece.data for piece in pieces) == stream
    assert [piece.data for piece in pieces if piece.kind is Kind.MESSAGE] == whole
    assert [piece.data for piece in pieces if piece.kind is Kind.COMMAND] == [READY]


def test_the_greeting_is_passed_on_as_it_comes() -> None:
    """libzmq sends the rest of it only after the other side's first ten bytes."""
    zmtp = Zmtp()
    assert list(zmtp.feed(GREETING[:10])) == [Piece(Kind.GREETING, GREETING[:10])]
    assert list(zmtp.feed(GREETING[10:])) == [Piece(Kind.GREETING, GREETING[10:])]


@given(
    MESSAGES,
    st.lists(st.integers(min_value=0), max_size=20),
    st.tuples(st.integers(0, 50), st.integers(50, 90)),
    st.integers(0, 30),
)
def test_what_is_only_slow_is_whole_and_in_order(
    sent: list[list[bytes]], cuts: list[int], delay_ms: tuple[int, int], bytes_per_ms: int
) -> None:
    stream = GREETING + b"".join(message(frames) for frames in sent)
    flow = Flow(Random(1))
    rules = Rules(delay_ms=delay_ms, bytes_per_ms=bytes_per_ms)
    got = b""
    for now_ms, part in enumerate(parts(stream, cuts)):
        flow.feed(part, rules, now_ms)
        got += flow.take(now_ms)
    while (due_ms := flow.due_ms) is not None:
        assert not flow.take(due_ms - 1)
        got += flow.take(due_ms)
    assert got == stream


def test_a_delay_keeps_to_its_bounds() -> None:
    flow = Flow(Random(2))
    for now_ms in range(0, 1_000, 100):
        flow.feed(GREETING if not now_ms else frame(b"x"), Rules(delay_ms=(20, 60)), now_ms)
        assert not flow.take(now_ms + 19)
        assert flow.take(now_ms + 60)


def test_a_trickle_is_as_slow_as_it_is_told() -> None:
    flow = Flow(Random(3))
    flow.feed(GREETING, CLEAN, 0)
    assert flow.take(0) == GREETING
    flow.feed(frame(bytes(200)), Rules(bytes_per_ms=2), 0)
    assert len(flow.take(50)) == 110
    assert len(flow.take(1_000)) == 92


@pytest.mark.parametrize(
    ("rules", "copies"),
    [(Rules(loss=1.0), 0), (CLEAN, 1), (Rules(duplicate=1.0), 2)],
    ids=["loss", "clean", "twice"],
)
def test_a_message_is_lost_passed_on_or_doubled(rules: Rules, copies: int) -> None:
    assert treat(Piece(Kind.MESSAGE, frame(PING)), rules, Random(4)) == [frame(PING)] * copies


def test_a_share_of_the_messages_is_lost() -> None:
    random = Random(5)
    lost = sum(not treat(Piece(Kind.MESSAGE, frame(PING)), Rules(loss=0.25), random) for _ in range(4_000))
    assert 900 < lost < 1_100


@pytest.mark.parametrize("content", [PING, PING + bytes(300)], ids=["short", "long"])
def test_a_garbled_message_keeps_its_frame_and_can_not_be_decoded(content: bytes) -> None:
    [got] = treat(Piece(Kind.MESSAGE, frame(content)), Rules(garble=1.0), Random(6))
    head = len(frame(content)) - len(content)
    assert (got[:head], len(got)) == (frame(content)[:head], len(frame(content)))
    with pytest.raises(ProtocolError):
        decode_request(got[head:])
    with pytest.raises(msgpack.exceptions.FormatError):
        msgpack.unpackb(got[head:])


@pytest.mark.parametrize("kind", [Kind.GREETING, Kind.COMMAND])
def test_what_is_no_message_is_never_harmed(kind: Kind) -> None:
    """Else there would be no connection to harm messages on."""
    rules = Rules(loss=1.0, duplicate=1.0, garble=1.0, tear=1.0)
    assert treat(Piece(kind, READY), rules, Random(7)) == [READY]
