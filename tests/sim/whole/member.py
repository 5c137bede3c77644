"""One process of an engine as the server knows it: the real heartbeat, without its thread."""

from collections.abc import Callable
from random import Random

from cache_server.protocol import messages as m
from cache_server.workers import Registry
from lmconnector.arena import ArenaMap
from lmconnector.errors import RegistrationError
from lmconnector.health import Timing
from lmconnector.heartbeat import Heartbeat, Membership
from lmconnector.link import Connected
from sim.whole.cache_process import CacheProcess
from sim.whole.network import Network, SimLink
from sim.whole.process import Process
from sim.whole.ranks import Bytes

REGISTRATION_DEADLINE_MS = 2_000


class SimMember:
    """`lmconnector.membership.Member`; the engine's gate is the scheduler's."""

    def __init__(  # noqa: PLR0917  a process meets all of its world
        self,
        registration: m.Register,
        process: Process,
        network: Network,
        server: CacheProcess,
        rng: Random,
        timing: Timing,
        on_step: Callable[["SimMember"], None],
    ) -> None:
        self.map: ArenaMap | None = None
        self.arena = b""
        self.registration_ms_max = 5
        self._registration = registration
        self.process = process
        self.disappointed_ms = -1  # when an operation last was
        self._network = network
        self._server = server
        self._time = network.time
        self._rng = rng
        self._on_step = on_step
        self._answer: m.Registered | str = ""
        self._wake_ms = 0
        self.heartbeat = Heartbeat(self._new_link, self._register, timing, process.clock, self._run)

    def start(self) -> None:
        """The process has its lock, and its heart begins to beat."""
        proof = self._registration.proof
        self._server.locked[proof] = self._server.lock_files[proof] = None
        self.process.run(self._begin)

    def die(self) -> None:
        self.process.is_dead = True
        self._server.locked.pop(self._registration.proof, None)
        if self.link is not None:
            self.link.close()

    @property
    def name(self) -> str:
        told = self._registration
        return f"{told.engine}'s {told.role} {told.rank}"

    def is_known_to(self, registry: Registry) -> bool:
        engine = registry.engines.get(self._registration.engine)
        place = (self._registration.role, self._registration.rank)
        return engine is not None and place in engine.members and engine.members[place].alive

    # The gate

    @property
    def usable(self) -> bool:
        return self.heartbeat.usable

    @property
    def session(self) -> int:
        membership = self.heartbeat.membership
        return membership.session if membership else 0

    def disappointed(self) -> None:
        self.disappointed_ms = self._time.now_ms
        self.heartbeat.disappointed()

    def succeeded(self) -> None:
        self.heartbeat.succeeded()

    def forgotten(self, session: int) -> None:
        self.heartbeat.forgotten(session)

    # The heartbeat's ports

    link: SimLink | None = None

    def _new_link(self) -> SimLink:
        self.link = SimLink(self._network, self._server, self.process, self._poke)
        return self.link

    def _begin(self) -> None:
        self.heartbeat.begin()
        self._step_at(self._time.now_ms)

    def _poke(self) -> None:
        self._step_at(self._time.now_ms)

    def _step_at(self, at_ms: int) -> None:
        if not self._wake_ms or at_ms < self._wake_ms:
            self._wake_ms = at_ms
            self._time.at(at_ms, lambda: self._step_if_due(at_ms))

    def _step_if_due(self, due_ms: int) -> None:
        if self._wake_ms == due_ms:  # else another one was due earlier
            self.process.run(self._step)

    def _step(self) -> None:
        self._wake_ms = 0
        self.heartbeat.step()
        self._on_step(self)
        self._step_at(max(self.heartbeat.health.wake_at_ms, self._time.now_ms))

    def _run(self, work: Callable[[], None]) -> None:
        """A registration's thread: asks over a connection of its own, maps, pins."""

        def end(answer: m.Registered | str) -> None:
            self._answer = answer
            work()

        def hear(answer: m.Registered | str) -> None:
            maps_ms = self.registration_ms_max if isinstance(answer, m.Registered) else 0
            pause_ms = self._rng.randint(0, maps_ms)
            self._time.after(pause_ms, lambda: self.process.run(lambda: end(answer)))

        _Asking(self._network, self._server, self.process, self._registration, hear)

    def _register(self) -> Membership:
        if isinstance(self._answer, str):
            raise RegistrationError(self._answer)
        reply = self._answer
        if self._registration.role == "worker" and (self.map is None or self.map.id != reply.arena.id):
            file = self._server.files[reply.arena.id]
            self.map = ArenaMap(reply.arena.id, file, Bytes(file, self._server.geometry))
        self.arena = reply.arena.id
        return Membership(reply.session, reply.boot)


class _Asking:
    """`lmconnector.client.ask`, for somebody who waits in a thread of his own."""

    def __init__(
        self,
        network: Network,
        server: CacheProcess,
        process: Process,
        request: m.Register,
        hear: Callable[[m.Registered | str], None],
    ) -> None:
        self._request = request
        self._hear = hear
        self._is_sent = False
        self._process = process
        self._link = SimLink(network, server, process, lambda: process.run(self._listen))
        network.time.after(REGISTRATION_DEADLINE_MS, lambda: process.run(self._give_up))

    def _listen(self) -> None:
        if self._link.closed:  # given up just before, when the process went on after a stall
            return
        for event in self._link.poll(0):
            if isinstance(event, Connected) and not self._is_sent:
                self._is_sent = self._link.send(self._request)
            if isinstance(event, m.Reply) and event.id == self._request.id:
                self._end(event if isinstance(event, m.Registered) else f"{event}")
                return

    def _give_up(self) -> None:
        self._end("no answer in time")

    def _end(self, answer: m.Registered | str) -> None:
        if not self._link.closed:
            self._link.close()
            self._hear(answer)
