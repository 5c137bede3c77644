"""A real server in this process, its loop in a thread; a peer between may lose or change its replies."""

import contextlib
import gc
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import zmq

from cache_server import config as configuration
from cache_server import runtime
from cache_server.canary import Order, Run, part_bytes_for
from cache_server.clock import monotonic_ms
from cache_server.orders import Orders
from cache_server.protocol import messages as m
from cache_server.protocol.codec import decode_request, encode
from cache_server.protocol.presence import LOCKS
from cache_server.server import Server
from cache_server.trials import Outcome
from cache_server.vitals import Vitals
from processes import eventually

Twist = Callable[[m.Request, m.Reply], m.Reply | None]


def honest(_request: m.Request, reply: m.Reply) -> m.Reply | None:
    return reply


class TwistedServer(Server):
    twist: Twist = staticmethod(honest)

    def _serve(self) -> None:
        if not self._socket.poll(self._socket.getsockopt(zmq.RCVTIMEO)):  # the twist of the moment it comes
            raise zmq.Again
        if self.twist is honest:
            super()._serve()
            return
        client, frame = self._socket.recv_multipart()
        reply = self.twist(decode_request(frame), self._reply_to([frame]))
        if reply is not None:
            with contextlib.suppress(zmq.ZMQError):  # it has gone meanwhile
                self._socket.send_multipart([client, encode(reply)], zmq.NOBLOCK)


class Live:
    def __init__(self, directory: Path, options: dict[str, str]) -> None:
        flags = {"dir": str(directory), "capacity": "16MiB", "http": "off", **options}
        self.config = configuration.parse(configuration.gather(flags, {}, None))
        access = runtime.Access(None)
        runtime.prepare(directory)
        (directory / LOCKS).mkdir()
        self.vitals = Vitals(self.config)
        self.server = TwistedServer(self.config, access, self.vitals, Orders())
        self._thread = threading.Thread(target=self.server.run, name="loop-under-test")

    @property
    def service(self):
        return self.server.service

    def start(self) -> None:
        self._thread.start()
        eventually(lambda: not self.service.storage.arena.raw_slabs, "populated")

    def stop(self) -> None:
        self.server.orders.stops = 2
        self._thread.join()
        self.server.close()
        self.vitals.close()
        gc.unfreeze()
        gc.set_threshold(700, 10, 10)

    def canary(self, deadline_ms: int = 5_000, turn: int = 0) -> Outcome:
        job = self.config.canary_job
        slots = self.server.published.status.slots
        size = part_bytes_for(job, slots, self.config.canary_bytes_max, turn)
        return Run(Order(self.config.runtime_dir, job, size, deadline_ms), monotonic_ms).do()

    def traces(self) -> dict[str, object]:
        """All that a canary could leave, or show as."""
        service, arena = self.service, self.service.storage.arena
        counters = {name: getattr(service.counters, name) for name in service.counters.__slots__}
        return {
            "engines": sorted(service.registry.engines),
            "reserved": dict(arena.reserved),
            "usage": arena.usage(),
            "chunks": len(service.storage.index),
            "evicted": service.storage.evicted,
            "leases": (service.leases.granted, len(service.canaries.leases)),
            "counters": {name: value for name, value in counters.items() if isinstance(value, int)},
            "ops": {op: each.count for op, each in service.counters.latency.items()},
            "refused": dict(service.counters.refused),
        }


@contextmanager
def live(**options: str) -> Iterator[Live]:
    directory = Path(tempfile.mkdtemp(prefix="csl-", dir="/dev/shm"))
    running = Live(directory, options)
    running.start()
    try:
        yield running
    finally:
        running.stop()
        rmtree(directory)
