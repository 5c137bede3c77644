"""A connection to the cache server.  The only module here that knows ZeroMQ.

A link belongs to the thread that made it; only `wake` may be called from another.
"""

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import zmq
from zmq.utils.monitor import parse_monitor_message

from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError, decode_reply, encode
from cache_server.protocol.presence import SOCKET

REQUESTS_WAITING_MAX = 1_024  # for a server that does not read; many prompts may come at once
EVENTS_MAX = 256  # of one `poll`: a peer that floods us does not keep us from judging it
RECONNECT_MS = 20  # a unix socket costs nothing to try
RECONNECT_MS_MAX = 200
HANDSHAKE_MS = 2_000  # for a peer that has accepted; ZeroMQ's own limit is half a minute
SILENCE_MS_MAX = 2_000  # after a request: then it may be that nobody reads this connection any more
READABLE = int(zmq.POLLIN)  # of a plain integer, not of an enumeration: it is looked at all the time


@dataclass(frozen=True, slots=True)
class Connected: ...


@dataclass(frozen=True, slots=True)
class Disconnected: ...


@dataclass(frozen=True, slots=True)
class Garbage:
    """Bytes that are no reply: whoever is there is not our server, or not a sane one."""

    detail: str


Event = m.Reply | Connected | Disconnected | Garbage


class Link(Protocol):
    def send(self, request: m.Request) -> bool:
        """Never waits; false: there is no connection, or nobody reads it."""
        ...

    def poll(self, timeout_ms: int) -> list[Event]: ...

    def wake(self) -> None:
        """Ends the `poll` of another thread."""
        ...

    def close(self) -> None: ...


class ZmqLink:
    def __init__(self, runtime_dir: Path) -> None:
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._wake_lock = threading.Lock()  # around each use of the fd's number by `wake` and `close`
        self._closed = False
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)  # a dead server collects no requests
        self._socket.setsockopt(zmq.SNDHWM, REQUESTS_WAITING_MAX)
        self._socket.setsockopt(zmq.MAXMSGSIZE, m.FRAME_BYTES_MAX)
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MS_MAX)
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        self._monitor = self._socket.get_monitor_socket(
            zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
        )
        self._address = f"ipc://{runtime_dir / SOCKET}"
        self._socket.connect(self._address)
        self._lost_s = 0.0  # when the connection was, if it is not back
        self._asked_s = 0.0  # when the first request since the last reply was sent, over this connection
        self._news: list[Event] = []  # of the connection, not yet told
        self._poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._wake_fd):
            self._poller.register(source, zmq.POLLIN)

    def send(self, request: m.Request) -> bool:
        now_s = time.monotonic()
        if self._is_silent(now_s):
            self._connect_anew()
        try:
            self._socket.send(encode(request), zmq.NOBLOCK)
        except zmq.Again:
            self._connect_after_loss(now_s)
            return False
        self._asked_s = self._asked_s or now_s
        return True

    def poll(self, timeout_ms: int) -> list[Event]:
        if timeout_ms and not self._news and self._wake_fd in dict(self._poller.poll(timeout_ms)):
            os.eventfd_read(self._wake_fd)
        # What became of the connection first: what is there to read was said by the newest one.
        self._watch()
        events, self._news = self._news, []
        while len(events) < EVENTS_MAX and _readable(self._socket):
            events.append(self._receive())
        return events

    def wake(self) -> None:
        with self._wake_lock:
            if not self._closed:  # else the number may be somebody else's by now
                os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        with self._wake_lock:
            self._closed = True
            os.close(self._wake_fd)
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()
        self._context.term()

    def _watch(self) -> None:
        while len(self._news) < EVENTS_MAX and _readable(self._monitor):
            happened = parse_monitor_message(self._monitor.recv_multipart())
            lost = happened["event"] == zmq.Event.DISCONNECTED
            self._lost_s = time.monotonic() if lost else 0.0
            self._asked_s = 0.0
            self._news.append(Disconnected() if lost else Connected())

    def _is_silent(self, now_s: float) -> bool:
        if not self._asked_s or now_s - self._asked_s <= SILENCE_MS_MAX / 1_000:
            return False
        self._watch()  # it may have been asked over an older connection
        return bool(self._asked_s) and not _readable(self._socket)

    def _connect_after_loss(self, now_s: float) -> None:
        """ZeroMQ tries again by itself, except after a peer that broke its protocol: a later one is not to
        pay for that."""
        if self._lost_s and now_s - self._lost_s > RECONNECT_MS_MAX / 1_000:
            self._lost_s = now_s
            self._connect_anew()

    def _connect_anew(self) -> None:
        self._asked_s = 0.0
        self._socket.disconnect(self._address)
        self._socket.connect(self._address)

    def _receive(self) -> Event:
        frames = self._socket.recv_multipart()
        self._asked_s = 0.0
        try:
            return decode_reply(frames[-1]) if len(frames) == 1 else Garbage(f"{len(frames)} frames")
        except ProtocolError as error:
            return Garbage(str(error))


def _readable(socket: zmq.Socket[bytes]) -> bool:
    """As `poll(0)`, at a tenth of its price: vLLM's scheduler asks at every step."""
    return bool(int(socket.getsockopt(zmq.EVENTS)) & READABLE)
