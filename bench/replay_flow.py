"""One request of a trace as the server sees it: LOOKUP, RESERVE and COMMIT of what is not there, RELEASE.

`Player` keeps many of them going over one socket from one thread, each at its time.
"""

import heapq
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import NamedTuple

import zmq

from bench.kit import Wire
from cache_server.protocol import messages as m
from cache_server.protocol.codec import decode_reply, encode
from cache_server.protocol.keys import HASH_BYTES, NO_PARENT, pack_slot_names, split_slot_refs
from cache_server.protocol.messages import Code, Outcome

BUSY_RETRY_S = 0.005
IDLE_MS = 200
Step = Callable[[int], m.Request]  # made when its id is known
Flow = Generator[Step, m.Reply, None]


class Arrival(NamedTuple):
    at_s: float
    hashes: bytes  # of the prompt's chunks, packed
    hold_s: float  # for so long its lease is kept


def flow(arrival: Arrival, session: int, name: str, batch: int, kept_max: int, books: Counter[str]) -> Flow:
    """Stores at most `kept_max` chunks, in batches."""
    hashes, chunks = arrival.hashes, len(arrival.hashes) // HASH_BYTES
    found = yield lambda id_: m.Lookup(id=id_, session=session, request=name, hashes=hashes)
    assert isinstance(found, m.Found), found
    books["requests"] += 1
    books["asked"] += chunks
    books["found"] += found.chunks
    at, end = found.chunks, min(chunks, kept_max)
    while at < end:
        count = min(batch, end - at)
        reserved = yield lambda id_, count=count: m.Reserve(id=id_, session=session, count=count)
        if isinstance(reserved, m.Refused):
            assert reserved.code in (Code.NO_SPACE, Code.BUSY), reserved
            books[f"refused {reserved.code}"] += 1
            return
        assert isinstance(reserved, m.Reserved), reserved
        cut = hashes[at * HASH_BYTES : (at + count) * HASH_BYTES]
        parent = hashes[(at - 1) * HASH_BYTES : at * HASH_BYTES] if at else NO_PARENT
        names = pack_slot_names(split_slot_refs(reserved.slots))
        committed = yield lambda id_, cut=cut, parent=parent, names=names: m.Commit(
            id=id_, session=session, hashes=cut, parent=parent, slots=names
        )
        assert isinstance(committed, m.Committed), committed
        books["stored"] += committed.outcomes.count(Outcome.STORED)
        if Outcome.ORPHAN in committed.outcomes:  # its parent has left meanwhile
            books["orphans"] += committed.outcomes.count(Outcome.ORPHAN)
            return
        at += count


class Player:
    def __init__(self, wire: Wire, sessions: Sequence[int], batch: int, kept_max: int) -> None:
        self.books: Counter[str] = Counter()
        self.late_s: list[float] = []
        self.leases_most = 0
        self._wire = wire
        self._sessions = sessions
        self._batch = batch
        self._kept_max = kept_max
        self._flows: dict[int, tuple[Flow, str, int, float]] = {}  # id -> flow, name, session, hold_s
        self._leases: list[tuple[float, str, int]] = []  # until when, name, session
        self._releases: set[int] = set()  # ids without an answer
        self._ids = 0

    def play(self, arrivals: Iterable[Arrival], window: int) -> float:
        """At most `window` at once; -> seconds taken."""
        coming = iter(arrivals)
        began_s = time.perf_counter()
        following = next(coming, None)
        while following is not None or self._flows or self._leases or self._releases:
            now_s = time.perf_counter() - began_s
            while following is not None and following.at_s <= now_s and len(self._flows) < window:
                self.late_s.append(now_s - following.at_s)
                self._begin(following)
                following = next(coming, None)
            self._release(now_s if following is not None or self._flows else float("inf"))
            self._receive(self._pause_ms(following, began_s, window), began_s)
        return time.perf_counter() - began_s

    def _pause_ms(self, following: Arrival | None, began_s: float, window: int) -> int:
        if following is None or len(self._flows) >= window:
            return IDLE_MS if self._flows or self._releases else 0
        return max(0, min(IDLE_MS, round(1_000 * (following.at_s - time.perf_counter() + began_s))))

    def _begin(self, arrival: Arrival) -> None:
        number = self.books["begun"] = self.books["begun"] + 1
        session, name = self._sessions[number % len(self._sessions)], f"request-{number}"
        begun = flow(arrival, session, name, self._batch, self._kept_max, self.books)
        self._ask((begun, name, session, arrival.hold_s), next(begun))

    def _ask(self, entry: tuple[Flow, str, int, float], step: Step) -> None:
        self._ids += 1
        self._flows[self._ids] = entry
        self._send(step(self._ids))

    def _send(self, request: m.Request) -> None:
        self.books["ops"] += 1
        self._wire.send(encode(request))

    def _receive(self, pause_ms: int, began_s: float) -> None:
        socket = self._wire.socket
        if not socket.poll(pause_ms):
            return
        while True:
            try:
                reply = decode_reply(socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            entry = self._flows.pop(reply.id, None)
            if entry is None:
                self._releases.remove(reply.id)
                continue
            going, name, session, hold_s = entry
            try:
                self._ask(entry, going.send(reply))
            except StopIteration:
                heapq.heappush(self._leases, (time.perf_counter() - began_s + hold_s, name, session))
                self.leases_most = max(self.leases_most, len(self._leases))

    def _release(self, until_s: float) -> None:
        while self._leases and self._leases[0][0] <= until_s:
            _, name, session = heapq.heappop(self._leases)
            self._ids += 1
            self._releases.add(self._ids)
            request = m.Release(id=self._ids, session=session, requests=(name,))
            self._send(request)


def scaled(prompts: Sequence[bytes], copies: int) -> Iterator[bytes]:
    """As many times the users, who share nothing: each prompt of the trace comes once for each copy."""
    for prompt in prompts:
        yield prompt
        for copy in range(1, copies):
            mark = copy.to_bytes(4, "big")
            yield b"".join(
                mark + prompt[at + 4 : at + HASH_BYTES] for at in range(0, len(prompt), HASH_BYTES)
            )
