"""A bare ROUTER that sends back what it gets: what a round trip costs without a cache server.

Ends with the process that started it.
"""

import os
import sys

import zmq

PARENT_CHECK_MS = 1_000


def main() -> None:
    parent = os.getppid()
    socket = zmq.Context().socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVTIMEO, PARENT_CHECK_MS)
    socket.bind(f"ipc://{sys.argv[1]}")
    while os.getppid() == parent:
        try:
            socket.send_multipart(socket.recv_multipart())
        except zmq.Again:
            continue


if __name__ == "__main__":
    main()
