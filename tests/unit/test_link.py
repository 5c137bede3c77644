"""The link over real sockets: what it reports, what it survives, and that nothing of it is left."""

import contextlib
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from cache_server.protocol import messages as m
from cache_server.protocol.codec import decode_request, encode
from cache_server.protocol.presence import SOCKET
from lmconnector.link import (
    EVENTS_MAX,
    REQUESTS_WAITING_MAX,
    Connected,
    Disconnected,
    Event,
    Garbage,
    ZmqLink,
)
from processes import eventually, short_dir
from threads import hammered

PONG = m.Pong(id=1, boot=7, seq=1, known=True, state="ready", progress=0, silence_ms=0)
DEADLINE_MS = 10_000
LIVES = 100


class Peer:
    """Whoever listens at the server's socket."""

    def __init__(self, runtime_dir: Path) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1_000)
        self._socket.bind(f"ipc://{runtime_dir / SOCKET}")
        self._client = b""

    def receive(self) -> m.Request:
        assert self._socket.poll(DEADLINE_MS), "nothing came"
        self._client, *frames = self._socket.recv_multipart()
        return decode_request(frames[0])

    def has_mail(self) -> bool:
        return bool(self._socket.poll(20))

    def send(self, *frames: bytes) -> None:
        self._socket.send_multipart([self._client, *frames])

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    with short_dir() as path:
        yield path


@pytest.fixture
def link(runtime_dir: Path) -> Iterator[ZmqLink]:
    with contextlib.closing(ZmqLink(runtime_dir)) as link:
        yield link


@pytest.fixture
def peer(runtime_dir: Path, link: ZmqLink) -> Iterator[Peer]:
    """One that has had a ping of ours, so that it can answer."""
    with contextlib.closing(Peer(runtime_dir)) as peer:
        assert events_until(link, Connected()) == [Connected()]
        assert link.send(m.Ping(id=1, seq=1))
        assert peer.receive() == m.Ping(id=1, seq=1)
        yield peer


def events_until(link: ZmqLink, last: Event) -> list[Event]:
    events: list[Event] = []
    eventually(lambda: events.extend(link.poll(100)) or last in events, f"{last}")
    return events


def heard(link: ZmqLink, count: int) -> list[Event]:
    events: list[Event] = []
    eventually(lambda: events.extend(link.poll(100)) or len(events) >= count, f"{count} events")
    return events


def test_without_a_server_nothing_is_sent_and_nothing_waits(link: ZmqLink) -> None:
    assert not link.send(m.Ping(id=1))
    assert link.poll(0) == []
    assert link.poll(20) == []


def test_a_request_and_its_reply(link: ZmqLink, peer: Peer) -> None:
    peer.send(encode(PONG))
    assert heard(link, 1) == [PONG]


def test_a_peer_that_answers_nothing_is_left_for_whoever_listens_there_now(
    runtime_dir: Path, link: ZmqLink, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lives on, and so does the connection to it."""
    monkeypatch.setattr("lmconnector.link.SILENCE_MS_MAX", 50)
    (runtime_dir / SOCKET).unlink()
    with contextlib.closing(Peer(runtime_dir)) as successor:
        time.sleep(0.1)
        link.send(m.Ping(id=2))  # to nobody, or to a successor who is quick
        assert events_until(link, Connected()) == [Connected()], "and no alarm for the end of the old one"
        assert link.send(m.Ping(id=3))
        assert 3 in iter(lambda: successor.receive().id, None)


def test_what_another_peer_left_unanswered_is_not_held_against_this_one(
    runtime_dir: Path, link: ZmqLink, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmconnector.link.SILENCE_MS_MAX", 50)
    peer.close()
    with contextlib.closing(Peer(runtime_dir)) as successor:
        eventually(lambda: link._watch() or Connected() in link._news, "a connection")
        time.sleep(0.1)
        assert link.send(m.Ping(id=2))
        assert successor.receive().id == 2
        assert link.poll(60_000) == [Disconnected(), Connected()], "told without waiting"


def test_a_reply_that_nobody_has_read_yet_is_one(
    link: ZmqLink, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lmconnector.link.SILENCE_MS_MAX", 50)
    peer.send(encode(PONG))
    time.sleep(0.1)
    assert link.send(m.Ping(id=2))
    assert link.poll(0) == [PONG]


def test_the_end_of_a_connection_and_the_next_one_are_seen(
    runtime_dir: Path, link: ZmqLink, peer: Peer
) -> None:
    peer.close()
    assert events_until(link, Disconnected()) == [Disconnected()]
    assert not link.send(m.Ping(id=2))
    with contextlib.closing(Peer(runtime_dir)) as successor:
        assert events_until(link, Connected()) == [Connected()]
        assert link.send(m.Ping(id=3))
        assert successor.receive() == m.Ping(id=3), "what was not sent is not sent later"


def test_a_new_connection_is_told_before_its_first_words(
    runtime_dir: Path, link: ZmqLink, peer: Peer
) -> None:
    """Also if nobody has polled meanwhile: a pong of the new server is not followed by the old one's end."""
    peer.close()
    with contextlib.closing(Peer(runtime_dir)) as successor:
        assert link._monitor.poll(DEADLINE_MS)
        # The end is told a little before it is felt: until then a ping goes to nobody.
        eventually(lambda: link.send(m.Ping(id=2)) and successor.has_mail(), "arrived")
        successor.receive()
        successor.send(encode(PONG))
        assert link._socket.poll(DEADLINE_MS)
        assert link.poll(0) == [Disconnected(), Connected(), PONG]


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"noise"],
        [b"\xc1"],
        [bytes(1_000)],
        [encode(PONG), encode(PONG)],
        [b"", encode(PONG)],
        [encode(m.Ping(id=1))],
        [encode(PONG)[:-1]],
        [b"\xdf" + struct.pack(">I", 2**32 - 1)],
    ],
    ids=[
        "empty",
        "noise",
        "reserved byte",
        "zeros",
        "two",
        "envelope",
        "a request",
        "cut off",
        "endless map",
    ],
)
def test_what_is_no_reply_is_reported_as_such(link: ZmqLink, peer: Peer, frames: list[bytes]) -> None:
    peer.send(*frames)
    peer.send(encode(PONG))
    first, second = heard(link, 2)
    assert isinstance(first, Garbage)
    assert first.detail
    assert second == PONG


def test_a_message_beyond_the_bound_costs_its_sender_the_connection(link: ZmqLink, peer: Peer) -> None:
    peer.send(bytes(m.FRAME_BYTES_MAX + 1))
    assert Disconnected() in events_until(link, Disconnected())


def test_a_peer_that_broke_the_protocol_is_not_held_against_its_successor(
    runtime_dir: Path, link: ZmqLink, peer: Peer
) -> None:
    peer.send(bytes(m.FRAME_BYTES_MAX + 1))
    events_until(link, Disconnected())
    peer.close()
    with contextlib.closing(Peer(runtime_dir)) as successor:
        # As above: what was sent before the end was felt went to nobody.
        eventually(lambda: link.send(m.Ping(id=2)) and successor.has_mail(), "arrived")
        assert successor.receive() == m.Ping(id=2)


def test_a_flood_does_not_keep_poll_from_returning(link: ZmqLink, peer: Peer) -> None:
    for _ in range(3 * EVENTS_MAX):
        peer.send(b"noise")
    counts: list[int] = []
    eventually(lambda: counts.append(len(link.poll(100))) or sum(counts) >= 3 * EVENTS_MAX, "all of it", 20.0)
    assert sum(counts) == 3 * EVENTS_MAX
    assert max(counts) <= EVENTS_MAX


def test_requests_to_a_server_that_does_not_read_are_refused_at_a_bound(link: ZmqLink, peer: Peer) -> None:
    hashes = bytes(32 * m.CHUNKS_MAX)
    request = m.Lookup(id=1, session=1, request="request", hashes=hashes)
    sent = 0
    while link.send(request):
        sent += 1
        assert sent < 100 * REQUESTS_WAITING_MAX
    assert sent >= REQUESTS_WAITING_MAX // 2, "a burst is not refused"


def test_a_wake_ends_the_poll_of_another_thread(link: ZmqLink) -> None:
    waker = threading.Thread(target=link.wake)
    waker.start()
    assert link.poll(60_000) == []
    waker.join()


def test_wakes_add_up_to_one(link: ZmqLink) -> None:
    for _ in range(1_000):
        link.wake()
    assert link.poll(60_000) == []
    assert not link._poller.poll(0)


def test_a_late_wake_writes_into_nobody_elses_file(runtime_dir: Path) -> None:
    link = ZmqLink(runtime_dir)
    number = link._wake_fd
    link.close()
    others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(64)]
    try:
        assert number in others, "the number is somebody else's now"
        link.wake()
        for other in others:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(other)
    finally:
        for other in others:
            os.close(other)


def test_wakes_that_race_the_close_write_into_nobody_elses_file(runtime_dir: Path) -> None:
    for _ in range(50):
        link = ZmqLink(runtime_dir)
        with hammered(link.wake):
            link.close()
            other = os.eventfd(0, os.EFD_NONBLOCK)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(other)
        os.close(other)


@pytest.mark.parametrize("listening", [False, True])
def test_nothing_is_left_of_many_links(runtime_dir: Path, *, listening: bool) -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    def nothing_more() -> bool:
        return all(now <= then for now, then in zip(count(), before, strict=True))

    with contextlib.closing(Peer(runtime_dir)) if listening else contextlib.nullcontext():
        before = count()
        for number in range(LIVES):
            link = ZmqLink(runtime_dir)
            if listening:
                events_until(link, Connected())
                assert link.send(m.Ping(id=number))  # and nobody reads it
            link.close()
            eventually(nothing_more, "nothing is left")
