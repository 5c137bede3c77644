"""The HTTP side: /metrics and /status, from the last snapshot, by a thread of its own.

The port is taken when the server starts, so that a taken one is a clear refusal; the rest, imports included,
happens in the thread and delays no PONG.
"""

import logging
import socket
import threading
from collections.abc import Callable

from cache_server.report import Status

log = logging.getLogger(__name__)

BACKLOG = 256


class HttpSide:
    def __init__(self, address: str) -> None:
        """Takes the port; nobody is answered before `start`."""
        host, _, port = address.rpartition(":")
        try:
            self._socket = socket.create_server((host.strip("[]"), int(port)), backlog=BACKLOG)
        except OSError as error:
            raise OSError(f"http = {address!r}: {error.strerror}: choose another --http, or off") from error
        self.port: int = self._socket.getsockname()[1]
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, snapshot: Callable[[], Status]) -> None:
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="http", daemon=True)
        self._thread.start()
        log.info("http: listening on port %d", self.port)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._socket.close()

    def _run(self, snapshot: Callable[[], Status]) -> None:
        from cache_server.pages import serve  # noqa: PLC0415  60 ms that the start need not wait for

        serve(self._socket, snapshot, self._stop)
