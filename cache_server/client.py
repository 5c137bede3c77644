"""A plain client: one request, one reply, one deadline.  For tools and tests; engines have their own."""

import itertools
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import zmq

from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError, decode_reply, encode
from cache_server.protocol.messages import Code
from cache_server.protocol.presence import SOCKET

R = TypeVar("R", bound=m.Reply)


class UnreachableError(Exception):
    """No answer in time; the message says from where and how long was waited."""


class RefusedError(Exception):
    def __init__(self, refusal: m.Refused) -> None:
        super().__init__(f"{refusal.code}: {refusal.detail}")
        self.code = refusal.code


class Client:
    def __init__(self, runtime_dir: Path, timeout_ms: int = 2_000) -> None:
        self.timeout_ms = timeout_ms
        self._path = runtime_dir / SOCKET
        self._ids = itertools.count(1)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(f"ipc://{self._path}")

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()
        self._context.term()

    def next_id(self) -> int:
        return next(self._ids)

    def ask(self, request: m.Request, expected: type[R]) -> R:
        """Raises `RefusedError` with the server's reason, `UnreachableError` without a server, and
        `ProtocolError` where a peer answers that does not speak as we do."""
        self._socket.send(encode(request))
        while self._socket.poll(self.timeout_ms):
            reply = decode_reply(self._socket.recv())
            if reply.id != request.id:
                continue  # to a request that was given up
            if isinstance(reply, m.Refused):
                raise RefusedError(reply)
            if not isinstance(reply, expected):
                answered = f"{type(request).__name__} answered by {type(reply).__name__}"
                raise ProtocolError(Code.MALFORMED, answered, reply.id)
            return reply
        raise UnreachableError(f"no answer from {self._path} within {self.timeout_ms} ms")
