"""Whoever listens at a runtime dir's socket and is no cache server, or a broken one."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq

from cache_server.protocol import messages as m
from cache_server.protocol.codec import decode_request
from cache_server.protocol.presence import SOCKET, TOKEN
from processes import short_dir

Answer = Callable[[m.Request], bytes]


@contextlib.contextmanager
def peer(answer: Answer) -> Iterator[Path]:
    """-> the runtime dir in which it answers"""
    with short_dir() as directory, zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        (directory / TOKEN).write_text("secret")
        socket.bind(f"ipc://{directory / SOCKET}")
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                if socket.poll(10):
                    client, frame = socket.recv_multipart()
                    socket.send_multipart([client, answer(decode_request(frame))])

        serving = threading.Thread(target=serve)
        serving.start()
        try:
            yield directory
        finally:
            stop.set()
            serving.join()
