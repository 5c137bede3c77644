"""Round trips to the server beside those to a bare echo, over equal sockets, with bytes packed before."""

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import zmq

from cache_server.protocol import messages as m
from cache_server.protocol.codec import encode
from cache_server.protocol.keys import HASH_BYTES
from cache_server.protocol.presence import SOCKET
from lmconnector.bench.rows import Row, alone, beside
from lmconnector.doctor.visit import Visit
from lmconnector.errors import UnavailableError

ROUNDS = 15
TRIPS = 100  # in a round
REGISTRATIONS = 20
LOOKUP_KEYS = 512
PART_BYTES = 1 << 20
ANSWER_MS = 2_000


class Wire:
    """A DEALER that carries bytes and looks at nothing."""

    def __init__(self, path: Path) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RCVTIMEO, ANSWER_MS)
        self._socket.connect(f"ipc://{path}")
        self._path = path

    def trips_us(self, request: bytes, count: int = TRIPS) -> float:
        """The median; raises `UnavailableError`."""
        taken: list[int] = []
        try:
            for _ in range(count):
                began_ns = time.perf_counter_ns()
                self._socket.send(request)
                self._socket.recv()
                taken.append(time.perf_counter_ns() - began_ns)
        except zmq.Again as error:
            raise UnavailableError(f"{self._path}: no answer within {ANSWER_MS} ms") from error
        return statistics.median(taken) / 1_000

    def close(self) -> None:
        self._socket.close()


def rows(visit: Visit, runtime_dir: Path, echo_path: Path) -> Iterator[Row]:
    registered = visit.register(PART_BYTES)
    session, hashes = registered.session, os.urandom(HASH_BYTES * LOOKUP_KEYS)
    requests = {
        "PING": m.Ping(id=1, session=session),
        f"LOOKUP of {LOOKUP_KEYS}, none there": m.Lookup(
            id=1, session=session, request="bench", hashes=hashes
        ),
    }
    with closing(Wire(runtime_dir / SOCKET)) as server, closing(Wire(echo_path)) as echo:
        for name, request in requests.items():
            packed = encode(request)
            ours: list[float] = []
            echoes: list[float] = []
            for number in range(ROUNDS + 1):  # the first is thrown away
                pair = server.trips_us(packed), echo.trips_us(packed)
                if number:
                    ours.append(pair[0])
                    echoes.append(pair[1])
            yield beside(name, "us", ours, "echo", echoes)
    yield registration(visit)


def registration(visit: Visit) -> Row:
    """As after each restart of the server: until the answer is there."""
    taken_ms: list[float] = []
    for _ in range(REGISTRATIONS):
        began_ns = time.perf_counter_ns()
        visit.register(PART_BYTES)
        taken_ms.append((time.perf_counter_ns() - began_ns) / 1e6)
    return alone("registration", "ms", taken_ms)
