"""The cache server's process: the real service over an arena in memory, and what may happen to it."""

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from cache_server.arena import Arena
from cache_server.eviction import POLICIES
from cache_server.index import Index
from cache_server.limits import Limits
from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError, decode_request
from cache_server.protocol.slots import (
    ENTRY_BYTES,
    FORMAT_VERSION,
    SLAB_POPULATED,
    Geometry,
    record_boot,
    write_header,
    write_slab,
)
from cache_server.service import Identity, Service
from cache_server.storage import Storage
from cache_server.workers import Registry, Seen
from sim.whole.timeline import Timeline

if TYPE_CHECKING:
    from sim.whole.network import SimLink

TICK_MS = 100
SCAN_MS = 400
TOKEN = "the admin's word"


class KilledError(BaseException):
    """In the midst of a write."""


class CacheProcess:
    def __init__(self, time: Timeline, geometry: Geometry, limits: Limits, policy: str) -> None:
        self.time = time
        self.geometry = geometry
        self.limits = limits
        self.links: dict[SimLink, None] = {}
        self.locked: dict[str, None] = {}  # presence files whose lock is held
        self.lock_files: dict[str, None] = {}  # those, and what the dead have left behind
        self.files: dict[bytes, memoryview] = {}  # every arena there was, by id
        self.starts = 0
        self.service: Service | None = None
        self._policy = policy
        self._sessions = 0
        self._thaw_ms = 0
        self._waiting: deque[Callable[[], None]] = deque()
        self._scan_ms = 0
        self._arena_id = b""
        self._left: dict[bytes, set[tuple[int, int]]] = {}  # by arena: what the last one before had committed
        self._torn: int | None = None  # the slot whose entry it had begun to write when it died
        self._on_death: Callable[[], None] = lambda: None
        self.on_tick: Callable[[], None] = lambda: None
        self.new_arena()

    @property
    def is_frozen(self) -> bool:
        return self.time.now_ms < self._thaw_ms

    @property
    def accepts(self) -> bool:
        return self.service is not None and not self.is_frozen

    @property
    def file(self) -> memoryview:
        return self.files[self._arena_id]

    # What happens to it

    def new_arena(self, *, populated: bool = True) -> None:
        self._arena_id = b"arena %010d" % len(self.files)
        file = memoryview(bytearray(self.geometry.file_bytes))
        write_header(file, self.geometry, self._arena_id)
        if populated:
            for slab in range(self.geometry.slabs):
                write_slab(file, self.geometry, slab, SLAB_POPULATED)
        self.files[self._arena_id] = file

    def start(self) -> None:
        """Takes over what the one before has left."""
        assert self.service is None
        self.starts += 1
        boots = record_boot(self.file, self.starts, 0)
        arena = Arena(self.file, self.geometry, boots)
        capacity = arena.usage().capacity
        told = m.Arena("arena", self._arena_id, FORMAT_VERSION, self.geometry.file_bytes, capacity)
        index = Index(POLICIES[self._policy])
        self.service = Service(
            Identity(1_000 + self.starts, TOKEN, told),
            Storage(arena, index),
            self.limits,
            Registry(self._new_session),
            self.locked.__contains__,
        )
        self._check_inheritance()
        self._thaw_ms = self._scan_ms = 0
        for link in list(self.links):
            link.reset()
            link.reconnect()
        self._tick(self.starts)

    def kill(self, *, told: bool) -> None:
        """`told`: the clients see their connections closed."""
        self._left[self._arena_id] = self._committed()
        self.service = None
        self._waiting.clear()
        self._thaw_ms = 0
        for link in list(self.links):
            if told:
                link.disconnect()

    def tear_a_write(self, after: int, written: int, on_death: Callable[[], None]) -> None:
        """It dies in one of its next writes into the table, of which so many bytes are written."""
        assert self.service is not None
        arena, at_of, file = self.service.storage.arena, self.geometry.entry_at, self.file
        write, left = arena._write, after

        def mortal(number: int, *what: object, **more: object) -> None:
            nonlocal left
            at = at_of(number)
            before = bytes(file[at : at + ENTRY_BYTES])
            write(number, *what, **more)
            if not left:
                file[at + written : at + ENTRY_BYTES] = before[written:]
                self._torn = number
                raise KilledError
            left -= 1

        arena._write = mortal
        self._on_death = on_death

    def spare(self) -> None:
        """From a torn write that was to come."""
        if self.service is not None:
            vars(self.service.storage.arena).pop("_write", None)

    def mortally(self, what: Callable[[], None]) -> None:
        try:
            what()
        except KilledError:
            self.kill(told=True)
            self._on_death()

    def _check_inheritance(self) -> None:
        left, committed = self._left.get(self._arena_id, set()), self._committed()
        if self._torn is None:
            assert committed == left, "what was committed is not what the next server knows"
        else:  # what was about to be freed may be there still
            lost = {number for _, number in left - committed}
            assert lost <= {self._torn}, "what was committed is lost with a torn entry of another"
        self._torn = None

    def _committed(self) -> set[tuple[int, int]]:
        assert self.service is not None
        slots = (chunk.slot for space in self.service.storage.index.spaces for chunk in space.chunks.values())
        return {(slot.generation, slot.number) for slot in slots}

    def freeze(self, ms: int) -> None:
        self._thaw_ms = self.time.now_ms + ms
        self.time.at(self._thaw_ms, self._thaw)

    def thaw(self) -> None:
        self._thaw_ms = self.time.now_ms
        self._thaw()

    def forget(self, number: int) -> None:
        """One of its members, by its place in the registry."""
        if self.service is not None:
            registry = self.service.registry
            sessions = [
                one.session for engine in registry.engines.values() for one in engine.members.values()
            ]
            if sessions:
                left = registry.unregister(sessions[number % len(sessions)])
                if left is not None:
                    self.service.leases.release_all(left.name)

    # What it does

    def receive(self, link: "SimLink", packed: bytes, starts: int) -> None:
        if self.service is None or starts != self.starts:
            return  # it was said to a server that is no more
        if self.is_frozen:
            self._waiting.append(lambda: self._answer(link, packed))
        else:
            self._answer(link, packed)

    def _answer(self, link: "SimLink", packed: bytes) -> None:
        service = self.service
        if service is None:
            return  # it died while it answered another one
        try:
            request = decode_request(packed)
        except ProtocolError as error:
            link.reply(service.refuse(error.id, error.code, error.detail))
            return
        self.mortally(lambda: link.reply(service.handle(request, self.time.now_ms)))

    def _new_session(self) -> int:
        self._sessions += 1
        return self._sessions

    def _thaw(self) -> None:
        if self.is_frozen or self.service is None:
            return
        for link in list(self.links):
            link.reconnect()
        while self._waiting:
            self._waiting.popleft()()

    def _tick(self, starts: int) -> None:
        if self.service is None or starts != self.starts:
            return
        if not self.is_frozen:
            arena = self.service.storage.arena
            for slab in arena.raw_slabs[:1]:
                arena.populated(slab)
            self.on_tick()
            self.mortally(self._work)
        self.time.after(TICK_MS, lambda: self._tick(starts))

    def _work(self) -> None:
        assert self.service is not None
        now_ms = self.time.now_ms
        self.service.tick(now_ms)
        if now_ms >= self._scan_ms:
            self._scan_ms = now_ms + SCAN_MS
            self.service.observe(Seen(frozenset(self.locked), frozenset(self.lock_files)), now_ms)
