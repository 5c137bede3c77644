"""The one loop: receive, decode, `service.handle`, reply, tick.

Threads: this loop owns the socket and everything in the service.  The populate thread writes into slabs that
nobody has yet; the HTTP thread reads `snapshot`, an object that is replaced and never changed.
"""

import contextlib
import gc
import logging
import os
import secrets
import threading
import time
from enum import Enum
from functools import partial

import msgspec
import zmq

from cache_server import endpoints, report
from cache_server.clock import monotonic_ms
from cache_server.config import Config
from cache_server.eviction import POLICIES
from cache_server.index import Index
from cache_server.limits import CLEAR_MS_MAX
from cache_server.locks import LockDir
from cache_server.orders import Orders
from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError, decode_request, encode
from cache_server.protocol.messages import FRAME_BYTES_MAX, Code
from cache_server.protocol.presence import SOCKET, is_file_at
from cache_server.protocol.slots import FORMAT_VERSION
from cache_server.published import Published
from cache_server.runtime import Access, admin_token
from cache_server.service import Identity, Service
from cache_server.shm import Populator, open_arena
from cache_server.storage import Storage
from cache_server.vitals import LOOP_TURN_MS, SNAPSHOT_MS, Vitals
from cache_server.workers import Registry

log = logging.getLogger(__name__)

POPULATING_TICK_MS = 10  # fresh memory is waited for
SCAN_MS = 400  # how often the presence files are looked at
FILES_MS = 1_000  # how often the runtime dir's own files are looked at
REPLIES_WAITING_MAX = 1_024  # for one client that does not read; further ones are dropped and counted
MORE_FOLLOWS = int(zmq.SNDMORE | zmq.NOBLOCK)
CLIENTS_WAITING_MAX = 1_024  # connections not yet accepted
ERRORS_LOGGED_MAX = 20  # internal errors with a stack trace, per boot


class Ending(Enum):
    STOPPED = "stopped"
    RESTART = "restart"  # the files it served are gone: begin again with fresh ones


class Server:
    """One start of the server: one boot id, one socket, one arena."""

    def __init__(self, config: Config, access: Access, vitals: Vitals, orders: Orders) -> None:
        gc.disable()  # until `run`: taking over a large arena makes many objects and no garbage
        self.config = config
        self.boot = secrets.randbits(62) + 1
        self.orders = orders
        self.started_ms = monotonic_ms()
        runtime_dir = config.runtime_dir
        self._socket_path = runtime_dir / SOCKET
        with orders.obeyed_at_once():
            vitals.faults.at("start")
            storage = self._take_over(access)
        arena = storage.arena
        self._locks = LockDir(runtime_dir)
        identity = Identity(
            self.boot,
            admin_token(runtime_dir),
            m.Arena(
                path=str(self._file.path),
                id=self._file.id,
                version=FORMAT_VERSION,
                file_bytes=self._file.geometry.file_bytes,
                capacity_bytes=self._file.geometry.capacity_bytes,
            ),
        )
        registry = Registry(lambda: secrets.randbits(62) + 1)
        self.service = Service(identity, storage, config.limits, registry, self._locks.is_locked)
        self._populator = Populator(self._file, arena.raw_slabs, vitals.populate, vitals.faults)
        self._vitals = vitals
        self._tiers = endpoints.Tiers()
        self._errors = 0
        self._scan_at_ms = self._snapshot_at_ms = self._files_at_ms = 0
        self._drain_until_ms = 0
        self._tick_at_ms = 0
        self._served = 0
        self._waiting_since_ms: int | None = None
        self._turned = self._ended = False
        self._look_around(monotonic_ms())
        self._context = zmq.Context()
        self._socket = self._bind(access)
        self._socket_file = self._socket_path.stat()
        self._pulse = vitals.loop.begin(monotonic_ms(), threading.current_thread().is_alive)
        vitals.page.told_boot(self.boot)
        log.info(
            'server: absent -> ready why="started" boot=%016x capacity_bytes=%d restored_chunks=%d',
            self.boot, self._file.geometry.capacity_bytes, storage.restored,
        )  # fmt: skip

    def _take_over(self, access: Access) -> Storage:
        config = self.config
        self._file = open_arena(config.arena_path, config.capacity, access.file_mode)
        access.open_file(self._file.path)
        arena = self._file.arena(self.boot, time.time_ns() // 1_000_000_000)
        storage = Storage(arena, Index(POLICIES[config.policy]))
        storage.spare_slots = config.canary_job.chunks if config.canary_idle else 0
        return storage

    def run(self) -> Ending:
        """Until it is told to stop."""
        self._populator.start()
        _calm_garbage_collector()
        ending = None
        while ending is None:
            with contextlib.suppress(zmq.Again):  # nothing came before the next tick
                self._serve()
            if monotonic_ms() >= self._tick_at_ms:
                ending = self._tick(monotonic_ms())
                self._turned = True
        self._ended = True
        self._pulse.end()
        return ending

    @property
    def published(self) -> Published:
        """For any thread, at any time."""
        return Published(
            boot=self.boot,
            turned=self._turned,
            draining=self.orders.stops > 0,
            paused=self.paused,
            stopped=self._ended,
            status=self.snapshot,
            endpoints=self.endpoints,
        )

    @property
    def paused(self) -> bool:
        return monotonic_ms() < self.orders.pause_until_ms

    def close(self) -> None:
        self._populator.stop()
        self._socket.close(linger=0)
        self._context.term()
        if self._socket_in_place():  # else it is the socket of whoever came after us
            self._socket_path.unlink()
        self._locks.close()
        self._file.close()

    def _bind(self, access: Access) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        socket.setsockopt(zmq.BACKLOG, CLIENTS_WAITING_MAX)
        socket.setsockopt(zmq.SNDHWM, REPLIES_WAITING_MAX)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reply that can't be sent is told, not lost unseen
        socket.setsockopt(zmq.RCVTIMEO, POPULATING_TICK_MS)
        try:
            socket.bind(f"ipc://{self._socket_path}")
        except zmq.ZMQError as error:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(self._socket_path)) from error
        access.open_file(self._socket_path)
        return socket

    def _socket_in_place(self) -> bool:
        return is_file_at(self._socket_path, self._socket_file)

    def _serve(self) -> None:
        """The parts one by one: pyzmq's calls for whole messages cost as much as a PING's decoding."""
        socket = self._socket
        client = socket.recv()
        frames: list[bytes] = []
        while socket.getsockopt(zmq.RCVMORE):
            frame = socket.recv()
            frames.append(b"" if frames else frame)  # of those that are too many nothing is kept
        reply = encode(self._reply_to(frames))
        try:
            socket.send(client, MORE_FOLLOWS)
            socket.send(reply, zmq.NOBLOCK)
        except zmq.Again:
            self.service.counters.refuse("UNREAD")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # it has gone meanwhile
                raise

    def _reply_to(self, frames: list[bytes]) -> m.Reply:
        began_ns = time.perf_counter_ns()
        service = self.service
        books = service.traffic
        op = "invalid"
        id = 0  # noqa: A001
        try:
            if len(frames) != 1:
                raise ProtocolError(Code.MALFORMED, f"{len(frames)} frames, expected 1")  # noqa: TRY301
            request = decode_request(frames[0])
            op, id = type(request).__name__.lower(), request.id  # noqa: A001
            books = service.books_of(request)
            if isinstance(request, m.Status):
                reply: m.Reply = self._status(request)
            elif isinstance(request, m.Clear):
                with self._vitals.loop_busy(self._pulse, "clearing", CLEAR_MS_MAX):
                    reply = service.handle(request, monotonic_ms())
            else:
                reply = service.handle(request, monotonic_ms())
        except ProtocolError as error:
            reply = service.refuse(error.id, error.code, error.detail)
        except Exception as error:
            self._errors += 1
            if self._errors <= ERRORS_LOGGED_MAX:
                log.exception("server: internal error while answering %s (%d so far)", op, self._errors)
            reply = service.refuse(id, Code.INTERNAL, f"{op}: {type(error).__name__}; see the server's log")
        books.counters.observe(op, (time.perf_counter_ns() - began_ns) // 1_000)
        return reply

    def _status(self, request: m.Status) -> m.StatusReply:
        status = self.describe(with_workers=request.workers)
        return m.StatusReply(id=request.id, boot=self.boot, status=msgspec.to_builtins(status))

    def describe(self, *, with_workers: bool = False) -> report.Status:
        now_ms = monotonic_ms()
        uptime_s = (now_ms - self.started_ms) // 1_000
        status = report.describe(self.service, now_ms, os.getpid(), uptime_s, self._populator.failure)
        if with_workers:
            status = msgspec.structs.replace(status, worker_rows=report.worker_rows(self.service, now_ms))
        return status

    def _tick(self, now_ms: int) -> Ending | None:
        arena = self.service.storage.arena
        pause_ms = POPULATING_TICK_MS if arena.populating else LOOP_TURN_MS
        self._tick_at_ms = now_ms + pause_ms
        self._socket.setsockopt(zmq.RCVTIMEO, pause_ms)
        for slab in self._populator.take_finished():
            arena.populated(slab)
        arena.population_failed = bool(self._populator.failure)
        self.service.paused = self.paused
        self.service.tick(now_ms)
        self._beat(now_ms)
        if now_ms >= self._scan_at_ms:
            self._scan_at_ms = now_ms + SCAN_MS
            seen = self._locks.look()
            for engine in self.service.observe(seen, now_ms):
                log.info("engine: gone: %s", engine)
            self._locks.remove(self.service.spent_proofs(seen))
        if now_ms >= self._snapshot_at_ms:
            self._snapshot_at_ms = now_ms + SNAPSHOT_MS
            self._look_around(now_ms)
        if now_ms >= self._files_at_ms:
            self._files_at_ms = now_ms + FILES_MS
            if not self._file.in_place or not self._socket_in_place():
                if self.orders.stops:
                    log.info("server: ends at once: arena or socket was removed, nobody finds it any more")
                    return Ending.STOPPED
                return Ending.RESTART
        return self._drained(now_ms) if self.orders.stops else None

    def _look_around(self, now_ms: int) -> None:
        self._tiers.observe_memory(self.service, self._populator.failure, now_ms)
        self.endpoints = endpoints.describe(self.service, self.config.requirement, self._tiers, now_ms)
        self.snapshot = self.describe()

    def _beat(self, now_ms: int) -> None:
        """Says that the loop turns, and since when requests wait of which none was served."""
        served = self.service.traffic.counters.served + self.service.canaries.counters.served
        finished, self._served = served - self._served, served
        if not self._socket.poll(0):
            self._waiting_since_ms = None
        elif self._waiting_since_ms is None or finished:
            self._waiting_since_ms = now_ms
        self._pulse.tick(now_ms, self._waiting_since_ms, finished)
        self._vitals.page.loop_turned(now_ms, self._pulse.ticks)
        self._vitals.faults.at("loop", partial(self._vitals.loop_busy, self._pulse))

    def _drained(self, now_ms: int) -> Ending | None:
        service = self.service
        if not service.draining:
            service.draining = True
            self._drain_until_ms = now_ms + self.config.drain
            log.info("server: drains leases=%d", len(service.leases))
        if service.leases and now_ms < self._drain_until_ms and self.orders.stops < 2:
            return None
        log.info("server: drained leases=%d", len(service.leases))
        return Ending.STOPPED


def _calm_garbage_collector() -> None:
    """Full collections would stop the loop for as long as the index is large, and find nothing: chunks are
    unlinked when they leave.  Young objects are still collected."""
    gc.freeze()
    gc.set_threshold(50_000, 50, 1_000_000)
    gc.enable()
