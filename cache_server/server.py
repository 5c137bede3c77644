"""The one loop: receive, decode, `service.handle`, reply, tick.

Threads: this loop owns the socket and everything in the service.  The populate thread writes into slabs that
nobody has yet; the HTTP thread reads `snapshot`, an object that is replaced and never changed.
"""

import contextlib
import gc
import logging
import os
import secrets
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import msgspec
import zmq

from cache_server import report
from cache_server.config import Config
from cache_server.eviction import POLICIES
from cache_server.index import Index
from cache_server.locks import LockDir
from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError, decode_request, encode
from cache_server.protocol.messages import FRAME_BYTES_MAX, Code
from cache_server.protocol.presence import ARENA, SOCKET, is_file_at
from cache_server.protocol.slots import FORMAT_VERSION
from cache_server.runtime import Access, admin_token
from cache_server.service import Identity, Service
from cache_server.shm import Populator, open_arena
from cache_server.storage import Storage
from cache_server.workers import Registry

log = logging.getLogger(__name__)

TICK_MS = 100
POPULATING_TICK_MS = 10  # fresh memory is waited for
SCAN_MS = 400  # how often the presence files are looked at
SNAPSHOT_MS = 500
FILES_MS = 1_000  # how often the runtime dir's own files are looked at
REPLIES_WAITING_MAX = 1_024  # for one client that does not read; further ones are dropped and counted
CLIENTS_WAITING_MAX = 1_024  # connections not yet accepted
ERRORS_LOGGED_MAX = 20  # internal errors with a stack trace, per boot


class Ending(Enum):
    STOPPED = "stopped"
    RESTART = "restart"  # the files it served are gone: begin again with fresh ones


def monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000


class Server:
    """One start of the server: one boot id, one socket, one arena."""

    def __init__(self, config: Config, access: Access) -> None:
        gc.disable()  # until `run`: taking over a large arena makes many objects and no garbage
        self.config = config
        self.boot = secrets.randbits(62) + 1
        self.stop_requests = 0
        self.started_ms = monotonic_ms()
        runtime_dir = config.runtime_dir
        self._socket_path = runtime_dir / SOCKET
        self._file = open_arena(Path(config.arena or runtime_dir / ARENA), config.capacity, access.file_mode)
        access.open_file(self._file.path)
        arena = self._file.arena(self.boot, time.time_ns() // 1_000_000_000)
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
        storage = Storage(arena, Index(POLICIES[config.policy]))
        registry = Registry(lambda: secrets.randbits(62) + 1)
        self.service = Service(identity, storage, config.limits, registry, self._locks.is_locked)
        self._populator = Populator(self._file, arena.raw_slabs)
        self._errors = 0
        self._scan_at_ms = self._snapshot_at_ms = self._files_at_ms = 0
        self._drain_until_ms = 0
        self._tick_at_ms = 0
        self.snapshot = self.describe()
        self._context = zmq.Context()
        self._socket = self._bind(access)
        self._socket_file = self._socket_path.stat()
        log.info(
            'server: absent -> ready why="started" boot=%016x capacity_bytes=%d restored_chunks=%d',
            self.boot, self._file.geometry.capacity_bytes, storage.restored,
        )  # fmt: skip

    def run(self, alive: Callable[[], None]) -> Ending:
        """Until it is told to stop; `alive` is called at every tick."""
        self._populator.start()
        _calm_garbage_collector()
        ending = None
        while ending is None:
            with contextlib.suppress(zmq.Again):  # nothing came before the next tick
                self._serve(self._socket.recv_multipart())
            if monotonic_ms() >= self._tick_at_ms:
                ending = self._tick(monotonic_ms())
                alive()
        return ending

    def close(self) -> None:
        self._populator.stop()
        self._socket.close(linger=0)
        self._context.term()
        if self._socket_in_place():  # else it is the socket of whoever came after us
            self._socket_path.unlink()
        self._file.close()

    def _bind(self, access: Access) -> zmq.Socket[bytes]:
        socket = self._context.socket(zmq.ROUTER)
        socket.setsockopt(zmq.MAXMSGSIZE, FRAME_BYTES_MAX)
        socket.setsockopt(zmq.BACKLOG, CLIENTS_WAITING_MAX)
        socket.setsockopt(zmq.SNDHWM, REPLIES_WAITING_MAX)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reply that can't be sent is told, not lost unseen
        socket.setsockopt(zmq.RCVTIMEO, POPULATING_TICK_MS)
        socket.bind(f"ipc://{self._socket_path}")
        access.open_file(self._socket_path)
        return socket

    def _socket_in_place(self) -> bool:
        return is_file_at(self._socket_path, self._socket_file)

    def _serve(self, message: list[bytes]) -> None:
        client, *frames = message
        reply = encode(self._reply_to(frames))
        try:
            self._socket.send_multipart([client, reply], zmq.NOBLOCK)
        except zmq.Again:
            self.service.counters.refuse("UNREAD")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:  # it has gone meanwhile
                raise

    def _reply_to(self, frames: list[bytes]) -> m.Reply:
        began_ns = time.perf_counter_ns()
        service = self.service
        op = "invalid"
        id = 0  # noqa: A001
        try:
            if len(frames) != 1:
                raise ProtocolError(Code.MALFORMED, f"{len(frames)} frames, expected 1")  # noqa: TRY301
            request = decode_request(frames[0])
            op, id = type(request).__name__.lower(), request.id  # noqa: A001
            if isinstance(request, m.Status):
                reply: m.Reply = self._status(request)
            else:
                reply = service.handle(request, monotonic_ms())
        except ProtocolError as error:
            reply = service.refuse(error.id, error.code, error.detail)
        except Exception as error:
            self._errors += 1
            if self._errors <= ERRORS_LOGGED_MAX:
                log.exception("server: internal error while answering %s (%d so far)", op, self._errors)
            reply = service.refuse(id, Code.INTERNAL, f"{op}: {type(error).__name__}; see the server's log")
        service.counters.observe(op, (time.perf_counter_ns() - began_ns) // 1_000)
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
        pause_ms = POPULATING_TICK_MS if arena.populating else TICK_MS
        self._tick_at_ms = now_ms + pause_ms
        self._socket.setsockopt(zmq.RCVTIMEO, pause_ms)
        for slab in self._populator.take_finished():
            arena.populated(slab)
        arena.population_failed = bool(self._populator.failure)
        self.service.tick(now_ms)
        if now_ms >= self._scan_at_ms:
            self._scan_at_ms = now_ms + SCAN_MS
            for engine in self.service.observe(self._locks.scan(), now_ms):
                log.info("engine: gone: %s", engine)
        if now_ms >= self._snapshot_at_ms:
            self._snapshot_at_ms = now_ms + SNAPSHOT_MS
            self.snapshot = self.describe()
        if now_ms >= self._files_at_ms:
            self._files_at_ms = now_ms + FILES_MS
            if not self._file.in_place or not self._socket_in_place():
                log.error('server: ready -> restart why="arena or socket was removed under it"')
                return Ending.RESTART
        return self._drained(now_ms) if self.stop_requests else None

    def _drained(self, now_ms: int) -> Ending | None:
        service = self.service
        if not service.draining:
            service.draining = True
            self._drain_until_ms = now_ms + self.config.drain
            log.info('server: ready -> draining why="asked to stop" leases=%d', len(service.leases))
        if service.leases and now_ms < self._drain_until_ms and self.stop_requests < 2:
            return None
        log.info('server: draining -> stopped why="drained" leases=%d', len(service.leases))
        return Ending.STOPPED


def _calm_garbage_collector() -> None:
    """Full collections would stop the loop for as long as the index is large, and find nothing: chunks are
    unlinked when they leave.  Young objects are still collected."""
    gc.freeze()
    gc.set_threshold(50_000, 50, 1_000_000)
    gc.enable()
