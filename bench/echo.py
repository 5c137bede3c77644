"""A bare ROUTER that answers each request with as many bytes as its first four say: what a round trip costs
without a cache server.  Ends with the process that started it."""

import os
import sys

import zmq

REPLY_BYTES_MAX = 1 << 20
PARENT_CHECK_MS = 1_000


def main() -> None:
    parent = os.getppid()
    context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, PARENT_CHECK_MS)
    socket.bind(f"ipc://{sys.argv[1]}")
    replies: dict[int, bytes] = {}
    while os.getppid() == parent:
        try:
            client, request = socket.recv_multipart()
        except zmq.Again:
            continue
        size = min(int.from_bytes(request[:4], "little"), REPLY_BYTES_MAX)
        reply = replies.get(size)
        if reply is None:
            reply = replies[size] = bytes(size)
        socket.send_multipart([client, reply])


if __name__ == "__main__":
    main()
