"""The sockets: connections that come and go, messages that take their time, get lost, come twice or torn.

What one peer sends arrives in order; what several send does not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError, decode_reply, encode
from lmconnector.link import Connected, Disconnected, Event, Garbage
from sim.whole.process import Process
from sim.whole.timeline import Timeline

if TYPE_CHECKING:
    from sim.whole.cache_process import CacheProcess

RECONNECT_MS_MAX = 200


@dataclass
class Network:
    """How it is at this moment; the swarm sets it."""

    time: Timeline
    rng: Random
    delay_ms_max: int = 0
    loss: float = 0.0
    duplicate: float = 0.0
    garble: float = 0.0
    slow_ms: int = 0  # from there on a ping and its pong may take too long together

    def lost(self) -> bool:
        return self.loss > 0 and self.rng.random() < self.loss

    def delay_ms(self) -> int:
        return self.rng.randint(0, self.delay_ms_max) if self.delay_ms_max else 0

    def copies(self) -> int:
        return 1 + (self.duplicate > 0 and self.rng.random() < self.duplicate)

    def is_garbled(self) -> bool:
        return self.garble > 0 and self.rng.random() < self.garble

    def torn(self, packed: bytes) -> bytes:
        """No message any more."""
        return packed[: self.rng.randint(0, len(packed) - 1)]


class SimLink:
    """`lmconnector.link.Link` of one thread of one process."""

    def __init__(
        self,
        network: Network,
        server: "CacheProcess",
        process: Process,
        poke: Callable[[], None] | None = None,
    ) -> None:
        """`poke`: somebody who does not wait in `poll`, and is told that there is something."""
        self._network = network
        self._server = server
        self._process = process
        self._poke = poke
        self._events: list[Event] = []
        self._woken = False
        self.is_connected = False
        self._cut_until_ms = 0
        self._there_ms = self._back_ms = 0  # when the last message each way arrives
        self.closed = False
        server.links[self] = None
        self.reconnect()

    # The port

    def send(self, request: m.Request) -> bool:
        assert not self.closed
        if not self.is_connected:
            return False
        network, time = self._network, self._network.time
        if self._gets_lost(self._process.there_cut_ms):
            return True
        packed, starts = encode(request), self._server.starts
        for _ in range(network.copies()):
            self._there_ms = self._arrival_ms(self._there_ms)
            arriving = self._perhaps_torn(packed)
            time.at(self._there_ms, lambda arriving=arriving: self._server.receive(self, arriving, starts))
        return True

    def poll(self, timeout_ms: int) -> list[Event]:
        if timeout_ms > 0 and self._poke is None and not self._events:
            time = self._network.time
            time.run_until(time.now_ms + timeout_ms, lambda: bool(self._events or self._woken))
            self._process.end_if_dead()
        self._woken = False
        events, self._events = self._events, []
        return events

    def wake(self) -> None:
        self._woken = True
        if self._poke is not None and not self.closed:
            self._poke()

    def close(self) -> None:
        self.closed = True
        self.is_connected = False
        self._server.links.pop(self, None)

    # What happens to it

    def cut(self, until_ms: int) -> None:
        """Nothing is told, nothing gets through, either way."""
        self._cut_until_ms = until_ms

    @property
    def is_whole(self) -> bool:
        """Both ways."""
        now_ms = self._network.time.now_ms
        cut_ms = max(self._cut_until_ms, self._process.there_cut_ms, self._process.back_cut_ms)
        return self.is_connected and now_ms >= cut_ms

    def disconnect(self) -> None:
        if self.is_connected:
            self.is_connected = False
            self._arrive(Disconnected())

    def reset(self) -> None:
        """The server behind it is another one now, and nobody has told."""
        self.is_connected = False

    def reconnect(self) -> None:
        time = self._network.time
        time.after(self._network.rng.randint(0, RECONNECT_MS_MAX), self._connect)

    def reply(self, reply: m.Reply) -> None:
        if self.closed or not self.is_connected or self._gets_lost(self._process.back_cut_ms):
            return
        packed, time = encode(reply), self._network.time
        for _ in range(self._network.copies()):
            self._back_ms = self._arrival_ms(self._back_ms)
            arriving = self._perhaps_torn(packed)
            time.at(self._back_ms, lambda arriving=arriving: self._arrive(_event_of(arriving)))

    def _arrival_ms(self, last_ms: int) -> int:
        """In order."""
        now_ms = self._network.time.now_ms
        arrival_ms = max(last_ms, now_ms + self._network.delay_ms())
        if arrival_ms - now_ms >= self._network.slow_ms:
            self._process.hurt_ms = now_ms
        return arrival_ms

    def _gets_lost(self, cut_until_ms: int) -> bool:
        now_ms = self._network.time.now_ms
        lost = now_ms < max(cut_until_ms, self._cut_until_ms) or self._network.lost()
        if lost:
            self._process.hurt_ms = now_ms
        return lost

    def _perhaps_torn(self, packed: bytes) -> bytes:
        if not self._network.is_garbled():
            return packed
        self._process.hurt_ms = self._network.time.now_ms
        return self._network.torn(packed)

    def _connect(self) -> None:
        if not self.closed and not self.is_connected and self._server.accepts:
            self.is_connected = True
            self._arrive(Connected())

    def _arrive(self, event: Event) -> None:
        if self.closed:
            return
        self._events.append(event)
        if self._poke is not None:
            self._poke()


def _event_of(packed: bytes) -> Event:
    try:
        return decode_reply(packed)
    except ProtocolError as error:
        return Garbage(str(error))
