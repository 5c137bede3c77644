"""What the HTTP side answers, and the loop that does."""

import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import msgspec

from cache_server.metrics import exposition
from cache_server.report import Status

log = logging.getLogger(__name__)

CLIENT_DEADLINE_S = 5.0  # to send its request and take its answer
STOP_CHECK_S = 0.2


def serve(listening: socket.socket, snapshot: Callable[[], Status], stop: threading.Event) -> None:
    with _Server(listening, snapshot) as server:
        while not stop.is_set():
            server.handle_request()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    timeout: float | None = STOP_CHECK_S

    def __init__(self, listening: socket.socket, snapshot: Callable[[], Status]) -> None:
        super().__init__(listening.getsockname()[:2], _Pages, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.snapshot = snapshot


class _Pages(BaseHTTPRequestHandler):
    timeout = CLIENT_DEADLINE_S  # type: ignore[mutable-override]  # set once, for every request

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        match self.path.partition("?")[0]:
            case "/metrics":
                self._answer(200, *exposition(self.server.snapshot()))
            case "/status":
                self._answer(200, "application/json", msgspec.json.encode(self.server.snapshot()))
            case _:
                self._answer(404, "text/plain", b"here are /metrics and /status\n")

    do_HEAD = do_GET  # noqa: N815

    def _answer(self, code: int, content_type: str, body: bytes) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        log.debug("http: " + format, *args)  # noqa: G003
