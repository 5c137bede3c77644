"""The HTTP side's one loop: many connections, one thread, each request answered from what is known already.

Rule 1: no answer waits for another thread, but that to `?deep=1`, and that one has a deadline.
Rule 2: a client that is slow, says too much or says nothing costs a place for a bounded time, and no more.
"""

import logging
import selectors
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from time import perf_counter_ns
from urllib.parse import parse_qs

import msgspec

from cache_server.answers import Answer

log = logging.getLogger(__name__)

CONNECTIONS_MAX = 512
REQUEST_BYTES_MAX = 8_192
CLIENT_DEADLINE_MS = 5_000  # to send its request, and to take its answer
READ_BYTES = 4_096
TURN_S = 0.2
TURN_BUSY_S = 0.02  # while somebody waits for a run of the canary
TEXT = "text/plain; charset=utf-8"


class Waiting(msgspec.Struct, frozen=True):
    """An answer that is not known yet: `answer` is asked again until it is, or until the deadline."""

    answer: Callable[[int], Answer | None]


Page = Callable[[int, str], Answer | Waiting]  # (now, query)


@dataclass(slots=True)
class _Client:
    socket: socket.socket
    deadline_ms: int
    received: bytearray = field(default_factory=bytearray)
    sending: memoryview = field(default_factory=lambda: memoryview(b""))
    waiting: Waiting | None = None
    head: bool = False
    path: str = ""
    began_ns: int = 0


class Pages:
    def __init__(
        self,
        listening: socket.socket,
        pages: dict[str, Page],
        clock: Callable[[], int],
        served: Callable[[str, int], None],
    ) -> None:
        self._listening = listening
        self._pages = pages
        self._clock = clock
        self._served = served  # (path, µs)
        self._selector = selectors.DefaultSelector()
        self._clients: dict[int, _Client] = {}
        self._accepting = False
        listening.setblocking(False)  # noqa: FBT003
        self._accept_if_room()

    def turn(self) -> None:
        """Waits for something to do, a moment at most, and does it."""
        waiting = any(client.waiting for client in self._clients.values())
        for key, events in self._selector.select(TURN_BUSY_S if waiting else TURN_S):
            if key.fileobj is self._listening:
                self._accept()
            else:
                self._serve(self._clients[key.fd], events)
        now_ms = self._clock()
        for client in list(self._clients.values()):
            if client.waiting is not None:
                self._answer_when_known(client, now_ms)
            elif now_ms >= client.deadline_ms:
                self._close(client)
        self._accept_if_room()

    def close(self) -> None:
        for client in list(self._clients.values()):
            self._close(client)
        self._selector.close()

    def _accept_if_room(self) -> None:
        """A full house leaves the rest in the kernel's queue."""
        room = len(self._clients) < CONNECTIONS_MAX
        if room and not self._accepting:
            self._selector.register(self._listening, selectors.EVENT_READ)
        elif not room and self._accepting:
            self._selector.unregister(self._listening)
        self._accepting = room

    def _accept(self) -> None:
        while len(self._clients) < CONNECTIONS_MAX:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return  # nobody is left, or descriptors are short for the moment
            connection.setblocking(False)  # noqa: FBT003
            client = _Client(connection, self._clock() + CLIENT_DEADLINE_MS)
            self._clients[connection.fileno()] = client
            self._selector.register(connection, selectors.EVENT_READ)
            self._receive(client)  # what comes with the connection is mostly there already

    def _serve(self, client: _Client, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._send(client)
        elif events & selectors.EVENT_READ:
            self._receive(client)

    def _receive(self, client: _Client) -> None:
        try:
            received = client.socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            received = b""
        if not received:
            self._close(client)
            return
        if client.sending or client.waiting:
            return  # it has been heard already
        client.received += received
        if b"\r\n\r\n" in client.received or b"\n\n" in client.received:
            self._answer(client)
        elif len(client.received) > REQUEST_BYTES_MAX:
            self._send_answer(client, _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too long\n"))

    def _answer(self, client: _Client) -> None:
        client.began_ns = perf_counter_ns()
        line = bytes(client.received.partition(b"\n")[0]).decode("latin-1").split()
        if len(line) != 3 or not line[2].startswith("HTTP/"):
            self._send_answer(client, _plain(HTTPStatus.BAD_REQUEST, "expected: GET /path HTTP/1.1\n"))
            return
        method, target, _ = line
        client.head = method == "HEAD"
        path, _, query = target.partition("?")
        page = self._pages.get(path)
        if method not in ("GET", "HEAD"):
            self._send_answer(client, _plain(HTTPStatus.METHOD_NOT_ALLOWED, "expected GET or HEAD\n"))
        elif page is None:
            known = " ".join(self._pages)
            self._send_answer(client, _plain(HTTPStatus.NOT_FOUND, f"nothing here; here are {known}\n"))
        else:
            client.path = path
            answer = self._ask(page, query)
            if isinstance(answer, Answer):
                self._send_answer(client, answer)
            else:
                client.waiting = answer

    def _ask(self, page: Page, query: str) -> Answer | Waiting:
        try:
            return page(self._clock(), query)
        except Exception:
            log.exception("http: internal error while answering")
            return _plain(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; see the server's log\n")

    def _answer_when_known(self, client: _Client, now_ms: int) -> None:
        assert client.waiting is not None, "it was looked up as waiting"
        answer = client.waiting.answer(now_ms)
        if answer is not None:
            client.waiting = None
            client.deadline_ms = now_ms + CLIENT_DEADLINE_MS
            self._send_answer(client, answer)

    def _send_answer(self, client: _Client, answer: Answer) -> None:
        lines = (
            f"HTTP/1.1 {answer.code} {HTTPStatus(answer.code).phrase}",
            f"Content-Type: {answer.content_type}",
            f"Content-Length: {len(answer.body)}",
            "Cache-Control: no-store",
            *answer.headers,
            "Connection: close",
        )
        head = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")
        client.sending = memoryview(head if client.head else head + answer.body)
        self._selector.modify(client.socket, selectors.EVENT_WRITE)
        self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            client.sending = client.sending[client.socket.send(client.sending) :]
        except BlockingIOError:
            return
        except OSError:
            self._close(client)
            return
        if not client.sending:
            if client.path:
                self._served(client.path, (perf_counter_ns() - client.began_ns) // 1_000)
            with suppress(OSError):
                client.socket.shutdown(socket.SHUT_WR)
            self._close(client)

    def _close(self, client: _Client) -> None:
        del self._clients[client.socket.fileno()]
        self._selector.unregister(client.socket)
        client.socket.close()


def flag(query: str, name: str) -> bool:
    return parse_qs(query).get(name, ["0"])[-1] not in ("0", "", "false")


def _plain(status: HTTPStatus, text: str) -> Answer:
    return Answer(status, TEXT, text.encode())
