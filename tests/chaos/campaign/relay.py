"""Stands between engines and a server, on a socket of its own, and does to what passes what it is told.

usage: relay.py SOCKET SERVERS_SOCKET SEED
A line in is an `Order` as JSON, which holds until the next one; `ok` comes back.  Ends with its stdin.

Threading model: one thread, one `poll` over all sockets.
"""

import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Iterator
from random import Random

import msgspec

from chaos.campaign.wire import Flow, Order, Rules

READY = "ready"
READ_BYTES = 1 << 16
ORDERS = 0  # the file that they come from
IDLE_MS = 60_000


class Half:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, sink: socket.socket, random: Random) -> None:
        self.source, self.sink = source, sink
        self.flow = Flow(random)
        self.unsent = b""
        self.ended = False  # its source says nothing more

    @property
    def is_done(self) -> bool:
        return self.ended and not self.unsent and self.flow.due_ms is None

    def read(self, rules: Rules, now_ms: int) -> None:
        data = self.source.recv(READ_BYTES)
        self.ended = not data
        self.flow.feed(data, rules, now_ms)

    def write(self, now_ms: int) -> None:
        self.unsent += self.flow.take(now_ms)
        if self.unsent:
            with contextlib.suppress(BlockingIOError):
                self.unsent = self.unsent[self.sink.send(self.unsent) :]


class Connection:
    def __init__(self, client: socket.socket, server: socket.socket, random: Random) -> None:
        self._sockets = (client, server)
        self.halves = (Half(client, server, random), Half(server, client, random))
        for each in self._sockets:
            each.setblocking(False)

    def events(self, order: Order) -> Iterator[tuple[int, int]]:
        for half, other, rules in self._directions(order):
            wanted = 0 if rules.stopped or half.ended else select.POLLIN
            yield half.source.fileno(), wanted | (select.POLLOUT if other.unsent else 0)

    def turn(self, order: Order, readable: set[int], now_ms: int) -> bool:
        """-> whether it is still open"""
        try:
            for half, _, rules in self._directions(order):
                if half.source.fileno() in readable and not rules.stopped and not half.ended:
                    half.read(rules, now_ms)
                half.write(now_ms)
        except OSError:
            return False
        return not any(half.is_done for half in self.halves)

    @property
    def due_ms(self) -> int | None:
        due = [at_ms for half in self.halves if (at_ms := half.flow.due_ms) is not None]
        return min(due, default=None)

    def close(self) -> None:
        for each in self._sockets:
            each.close()

    def _directions(self, order: Order) -> Iterator[tuple[Half, Half, Rules]]:
        to_server, to_client = self.halves
        yield to_server, to_client, order.to_server
        yield to_client, to_server, order.to_client


class Relay:
    def __init__(self, path: str, server_path: str, random: Random) -> None:
        self._server_path = server_path
        self._random = random
        self._order = Order()
        self._connections: list[Connection] = []
        self._said = b""
        self._door = socket.socket(socket.AF_UNIX)
        self._door.bind(path)
        self._door.listen(128)

    def turn(self) -> bool:
        """-> whether there may be more orders"""
        ready = self._wait()
        if ORDERS in ready and not self._obey():
            return False
        if self._door.fileno() in ready:
            self._accept()
        now_ms = _now_ms()
        for each in self._connections[:]:
            if not each.turn(self._order, ready, now_ms):
                self._drop(each)
        return True

    def _wait(self) -> set[int]:
        """-> what can be read"""
        poller = select.poll()
        poller.register(ORDERS, select.POLLIN)
        poller.register(self._door, select.POLLIN)
        for each in self._connections:
            for fd, events in each.events(self._order):
                if events:  # else its end would be told for ever
                    poller.register(fd, events)
        due = [at_ms for each in self._connections if (at_ms := each.due_ms) is not None]
        timeout_ms = max(0, min(due) - _now_ms()) if due else IDLE_MS
        return {fd for fd, happened in poller.poll(timeout_ms) if happened != select.POLLOUT}

    def _obey(self) -> bool:
        data = os.read(ORDERS, READ_BYTES)
        *lines, self._said = (self._said + data).split(b"\n")
        for line in lines:
            self._order = msgspec.json.decode(line, type=Order)
            if self._order.closed or self._order.close_once:
                for each in self._connections[:]:
                    self._drop(each)
            print("ok", flush=True)
        return bool(data)

    def _accept(self) -> None:
        client, _ = self._door.accept()
        server = socket.socket(socket.AF_UNIX)
        try:
            if self._order.closed:
                raise ConnectionRefusedError  # as if there were no server
            server.connect(self._server_path)
        except OSError:
            client.close()
            server.close()
            return
        self._connections.append(Connection(client, server, self._random))

    def _drop(self, connection: Connection) -> None:
        self._connections.remove(connection)
        connection.close()


def _now_ms() -> int:
    return time.monotonic_ns() // 1_000_000


def main() -> None:
    path, server_path, seed = sys.argv[1:]
    relay = Relay(path, server_path, Random(int(seed)))
    print(READY, flush=True)
    while relay.turn():
        pass


if __name__ == "__main__":
    main()
