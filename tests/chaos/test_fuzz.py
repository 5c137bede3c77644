"""A million malformed messages to a real server, while a good engine beside them stores and loads."""

import contextlib
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from random import Random

import msgpack
import msgspec
import pytest
import zmq

from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError, decode_request, encode
from cache_server.protocol.keys import pack_slot_names
from cache_server.protocol.messages import FRAME_BYTES_MAX, Code, Outcome
from cache_server.protocol.presence import SOCKET
from cache_server.server import REPLIES_WAITING_MAX
from cache_server.session import Session
from contract.frames import breed, hostile_frames
from contract.samples import REQUESTS
from processes import ServerProcess, eventually, server

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(280)]

MESSAGES = 1_000_000
ROUNDS = 100
WARM_UP_ROUNDS = 10
TIME_MAX_S = 150.0  # on a machine that is slow or busy there are fewer messages
MESSAGES_MIN = MESSAGES // 5
POOL = 1_200  # distinct frames of one round
BETWEEN_CHECKS = 2_000  # messages from one look at the good engine to the next
WINDOW = REPLIES_WAITING_MAX // 8  # unanswered: ZeroMQ may drop replies well before the limit it was given
WINDOW_BYTES = 8 << 20
ANSWER_DEADLINE_MS = 10_000
GROWTH_MAX_KB = 16 << 10
ANSWERS_TO_GOOD = {"done", "found", "reserved", "committed", "registered", "pong", "status"}
FILES_MAX = 8  # descriptors that may come and go beside the connections

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16) + bytes(32)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"
PING = encode(m.Ping(id=1))
Expected = tuple[int, str | None]  # the reply's id; the code of its refusal where the bytes alone decide it


@dataclass
class Stream:
    """Many messages on their way, and what is to come back for each, in order."""

    socket: zmq.Socket
    sent: int = 0
    waiting: deque[tuple[Expected, int]] = field(default_factory=deque)
    waiting_bytes: int = 0
    codes: Counter[str] = field(default_factory=Counter)

    def send(self, frames: list[bytes], expected: Expected) -> None:
        size = sum(map(len, frames))
        while len(self.waiting) >= WINDOW or (self.waiting and self.waiting_bytes + size > WINDOW_BYTES):
            self.receive()
        self.socket.send_multipart(frames)
        self.sent += 1
        self.waiting.append((expected, size))
        self.waiting_bytes += size

    def receive(self) -> None:
        """Waits for one reply and takes all there are."""
        assert self.socket.poll(ANSWER_DEADLINE_MS), f"{len(self.waiting)} messages are not answered"
        with contextlib.suppress(zmq.Again):
            while True:
                self._check(self.socket.recv(zmq.NOBLOCK))

    def drain(self) -> None:
        while self.waiting:
            self.receive()

    def _check(self, reply: bytes) -> None:
        assert self.waiting, "a reply to nothing"
        (id_, code), size = self.waiting.popleft()
        self.waiting_bytes -= size
        body = msgpack.unpackb(reply)
        got = body.get("code")
        self.codes[got or body["op"]] += 1
        assert body["id"] == id_, body
        assert got == code if code else got != Code.INTERNAL, body


class GoodEngine:
    """Stores, loads and pings, and looks at every byte."""

    def __init__(self, runtime_dir: Path) -> None:
        self._session = Session(runtime_dir, "good", part_bytes=64 << 10, namespace=b"good")
        self._boot = self._session.boot
        self._stored: deque[list[bytes]] = deque(maxlen=40)
        self.rounds = 0
        self.slowest_ms = 0

    def check(self) -> None:
        self.rounds += 1
        began_ns = time.perf_counter_ns()
        pong = self._session.ping()
        self.slowest_ms = max(self.slowest_ms, (time.perf_counter_ns() - began_ns) // 1_000_000)
        assert (pong.known, pong.boot) == (True, self._boot)
        hashes = [sha256(b"%d %d" % (self.rounds, number)).digest() for number in range(4)]
        outcomes = self._session.store(hashes, [self._content(hash_) for hash_ in hashes])
        assert outcomes == bytes([Outcome.STORED] * 4)
        self._stored.append(hashes)
        assert self._load(hashes) == 4
        self._load(self._stored[0])  # may have been evicted meanwhile, from its end on

    def close(self) -> None:
        self._session.abandon()

    def _load(self, hashes: list[bytes]) -> int:
        contents = self._session.load(hashes)
        assert contents == [self._content(hash_) for hash_ in hashes[: len(contents)]]
        return len(contents)

    @staticmethod
    def _content(hash_: bytes) -> bytes:
        return hash_ * 2048


class Victims:
    """Engines in whose name the fuzz speaks, so that it comes past the door.  New ones in every round: the
    fuzz ends their sessions and fills their stock."""

    def __init__(self, runtime_dir: Path, round_number: int) -> None:
        self._working = Session(runtime_dir, f"working {round_number}", 4096, b"fuzzed")
        self._churned = Session(runtime_dir, f"churned {round_number}", 4096, b"churned")

    def good_frames(self, random: Random) -> list[bytes]:
        """Requests that are granted."""
        content = {
            "session": self._working.session,
            "group": 0,
            "hashes": random.randbytes(6 * 32),
            "slots": pack_slot_names(self._working.reserve(6)),
            "parent": b"",
            "epoch": 0,
        }
        frames = []
        for request in REQUESTS:
            known = {name: value for name, value in content.items() if name in request.__struct_fields__}
            frames.append(encode(self._granted(msgspec.structs.replace(request, **known))))
        return frames

    def close(self) -> None:
        for session in (self._working, self._churned):
            session.abandon()

    def _granted(self, request: m.Request) -> m.Request:
        match request:
            case m.Register():
                return msgspec.structs.replace(
                    request,
                    engine=self._churned.engine,
                    proof=self._churned._presence.name,
                    rank=0,
                    layout=m.Layout(groups=(m.Group(4096), m.Group(8192, window=2))),
                )
            case m.Unregister():
                return msgspec.structs.replace(request, session=self._churned.session)
            case m.Clear():
                return msgspec.structs.replace(request, token="")
            case _:
                return request


def expected_of(frames: list[bytes]) -> Expected:
    if len(frames) != 1:
        return 0, Code.MALFORMED
    try:
        return decode_request(frames[0]).id, None
    except ProtocolError as error:
        return error.id, error.code


def pool_of(random: Random, good: list[bytes]) -> list[tuple[list[bytes], Expected]]:
    messages = [[breed(random, good)] for _ in range(POOL)]
    messages += [[frame] for frame in good * 12]
    messages += [[random.randbytes(random.randrange(200))] for _ in range(POOL // 20)]
    messages += [[b""], [b"", b""], [b"", good[2]], [good[2], good[2]], [good[2], b""], [b"x"] * 100]
    return [(frames, expected_of(frames)) for frames in messages]


def heavy(random: Random) -> Iterator[list[bytes]]:
    """Each of them costs time or memory; a few in every round."""
    for frame in random.sample(list(hostile_frames().values()), 12):
        yield [frame]
    yield [bytes(random.randrange(FRAME_BYTES_MAX - 8))]
    yield [bytes(FRAME_BYTES_MAX - 64)]
    yield [bytes(1 << 16)] * random.randrange(2, 40)
    yield [b"\x91" * (1 << 20)]


def bare_connection(path: Path, *, greeted: bool = False) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(ANSWER_DEADLINE_MS / 1_000)
    connection.connect(str(path))
    if greeted:
        connection.sendall(GREETING)
        assert received(connection, b"NULL" + bytes(48))
        connection.sendall(READY)
    return connection


def received(connection: socket.socket, wanted: bytes) -> bool:
    """Whether this comes before the other side closes the connection."""
    data = b""
    while wanted not in data:
        more = connection.recv(1 << 16)
        if not more:
            return False
        data += more
    return True


def is_closed(connection: socket.socket) -> bool:
    """Waits until the other side has."""
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):
        while connection.recv(1 << 16):
            pass
    return True


def rude_connections(path: Path, random: Random) -> None:
    """Bytes that ZeroMQ itself refuses, on connections of their own."""
    with bare_connection(path, greeted=True) as connection:
        connection.sendall(b"\x00" + bytes([len(PING)]) + PING)
        assert received(connection, b"pong"), "so far it is what ZeroMQ speaks"
    for announced in (FRAME_BYTES_MAX + 1, 1 << 40, (1 << 63) - 1):
        with bare_connection(path, greeted=True) as connection:
            connection.sendall(b"\x02" + announced.to_bytes(8) + bytes(1 << 12))
            assert is_closed(connection)
    endless = b"\x03" + (1 << 16).to_bytes(8) + bytes(1 << 16)  # a frame with more to come
    for rude in (
        random.randbytes(500),
        b"\x04\x02\x01\x00",
        b"\x04\xff" + random.randbytes(255),
        b"\x01\x00" * 500,
        b"\x02" + FRAME_BYTES_MAX.to_bytes(8) + bytes(1 << 16),
        endless * 16,
    ):
        with bare_connection(path, greeted=True) as connection:
            send_if_open(connection, rude)
    for rude in (
        b"",
        random.randbytes(200),
        GREETING[: random.randrange(64)],
        GREETING + random.randbytes(100),
        GREETING + b"\x04\xff\x05READY" + b"\xff" * 260,
        GREETING + b"\x04\x06\x05PINGS",
    ):
        with bare_connection(path) as connection:
            send_if_open(connection, rude)


def send_if_open(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(data)


def rss_anon_kb(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def reserved_bytes(process: ServerProcess) -> int:
    arena = process.status().arena
    return arena.stocked_bytes + arena.quarantined_bytes


def open_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@contextlib.contextmanager
def stream_to(process: ServerProcess) -> Iterator[Stream]:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.LINGER, 0)
    dealer.connect(f"ipc://{process.runtime_dir / SOCKET}")
    try:
        yield Stream(dealer)
    finally:
        dealer.close()
        context.term()


def fuzz_one_round(random: Random, stream: Stream, good_frames: list[bytes], good_engine: GoodEngine) -> None:
    pool = pool_of(random, good_frames)
    for frames in heavy(random):
        stream.send(frames, expected_of(frames))
    messages = MESSAGES // ROUNDS
    for number, (frames, expected) in enumerate(random.choices(pool, k=messages)):
        stream.send(frames, expected)
        if number % BETWEEN_CHECKS == 0:
            good_engine.check()  # with a window full of messages on their way
    stream.drain()


def test_a_million_malformed_messages(capsys: pytest.CaptureFixture[str]):
    random = Random(20_240_229)
    began_s = time.monotonic()
    warm_kb = 0
    with server("--log-level", "error", "--stock-percent", "2") as process, stream_to(process) as stream:
        pid, boot = process.pid, process.status().boot
        cold_kb, files = rss_anon_kb(pid), open_files(pid)
        with contextlib.closing(GoodEngine(process.runtime_dir)) as good_engine:
            for number in range(ROUNDS):
                with contextlib.closing(Victims(process.runtime_dir, number)) as victims:
                    fuzz_one_round(random, stream, victims.good_frames(random), good_engine)
                rude_connections(process.runtime_dir / SOCKET, random)
                if number == WARM_UP_ROUNDS:
                    warm_kb = rss_anon_kb(pid)
                if time.monotonic() - began_s > TIME_MAX_S:
                    break
            took_s = time.monotonic() - began_s
            good_engine.check()
            stream.send([encode(m.Ping(id=4711))], (4711, None))
            stream.drain()  # the last reply is to the last message: each had exactly one
        end_kb = rss_anon_kb(pid)
        with capsys.disabled():
            print(
                f"\nfuzz: {stream.sent} messages in {took_s:.0f} s, RssAnon {cold_kb} -> {warm_kb} -> "
                f"{end_kb} kB, {good_engine.rounds} checks, slowest ping {good_engine.slowest_ms} ms\n"
                f"      {dict(stream.codes.most_common())}"
            )
        status = process.check_conservation()
        assert (status.pid, status.boot) == (pid, boot)
        assert status.refused.get(Code.INTERNAL, 0) == 0
        assert process.log.read_text() == ""
        assert stream.sent >= MESSAGES_MIN
        assert end_kb - warm_kb < GROWTH_MAX_KB
        assert set(stream.codes) >= ANSWERS_TO_GOOD, "the fuzz reaches every op"
        eventually(lambda: reserved_bytes(process) == 0, "the return of the dead engines' slots")
        eventually(lambda: open_files(pid) <= files + FILES_MAX, "the connections' end")
        process.check_conservation()


def test_replies_that_nobody_reads_are_dropped_and_counted():
    requests = 3_000
    with server() as process, stream_to(process) as stream:
        for number in range(requests):
            stream.socket.send(encode(m.Status(id=number)))
        eventually(lambda: process.status().counters["served"] >= requests, "all of them served")
        read = 0
        while stream.socket.poll(500):
            stream.socket.recv()
            read += 1
        assert read < requests
        assert process.status().refused.get("UNREAD", 0) == requests - read
