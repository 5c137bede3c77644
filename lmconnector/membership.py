"""How one process of the engine becomes known to the server: presence, registration, heartbeat."""

import os
from pathlib import Path

import msgspec

from cache_server.protocol import messages as m
from cache_server.protocol.presence import Presence, presence_name
from lmconnector.arena import ArenaMap
from lmconnector.client import ask
from lmconnector.config import Options
from lmconnector.errors import RegistrationError, UnavailableError
from lmconnector.heartbeat import Heartbeat, Membership, monotonic_ms
from lmconnector.link import ZmqLink


class Member:
    """Registers in the heartbeat's time, again whenever it must; `map` is the last one that was mapped."""

    def __init__(self, options: Options, registration: m.Register) -> None:
        """`registration`: all but its proof."""
        self.map: ArenaMap | None = None  # of a worker
        self.arena = b""  # the id of the one that the server serves
        self.runtime_dir = Path(options.dir)
        self._registration = registration
        self._copies = registration.role == "worker"
        self._presence: Presence | None = None
        self.heartbeat = Heartbeat(lambda: ZmqLink(self.runtime_dir), self._register, options.timing)
        self._deadline_ms = options.request_deadline_ms

    # What the scheduler's side asks and tells: its gate.

    @property
    def usable(self) -> bool:
        return self.heartbeat.usable

    @property
    def session(self) -> int:
        membership = self.heartbeat.membership
        return membership.session if membership else 0

    def disappointed(self) -> None:
        self.heartbeat.disappointed()

    def succeeded(self) -> None:
        self.heartbeat.succeeded()

    def forgotten(self, session: int) -> None:
        self.heartbeat.forgotten(session)

    def close(self) -> None:
        self.heartbeat.stop(timeout_ms=1_000)
        membership = self.heartbeat.membership
        if membership is not None:
            link = ZmqLink(self.runtime_dir)
            try:
                ask(link, m.Unregister(id=1, session=membership.session), 200, monotonic_ms)
            except UnavailableError:
                return  # it will see our lock go
            finally:
                link.close()
        if self._presence is not None:
            self._presence.close()

    def _register(self) -> Membership:
        try:
            if self._presence is None or not self._presence.in_place:
                self._presence = Presence(self.runtime_dir, presence_name(self._registration.engine))
        except OSError as error:
            raise RegistrationError(
                f"{self.runtime_dir}: {error.strerror}: is a server running there?"
            ) from error
        link = ZmqLink(self.runtime_dir)
        try:
            request = msgspec.structs.replace(self._registration, proof=self._presence.name)
            reply = ask(link, request, self._deadline_ms, monotonic_ms)
        except UnavailableError as error:
            raise RegistrationError(str(error)) from error
        finally:
            link.close()
        if isinstance(reply, m.Refused):
            raise RegistrationError(f"{reply.code}: {reply.detail}")
        if not isinstance(reply, m.Registered):
            raise RegistrationError(f"REGISTER was answered by {type(reply).__name__}")
        if self._copies and (self.map is None or self.map.id != reply.arena.id):
            self.map = ArenaMap(reply.arena)
        self.arena = reply.arena.id
        return Membership(reply.session, reply.boot)


def registration(
    engine: str, rank: int, world: int, namespace: bytes, layout: m.Layout | None = None
) -> m.Register:
    """With a layout: a worker's; without: the scheduler's."""
    return m.Register(
        id=1,
        version_min=m.VERSION_MIN,
        version_max=m.VERSION_MAX,
        engine=engine,
        role="worker" if layout else "scheduler",
        rank=rank,
        world=world,
        namespace=namespace,
        proof="none yet",
        pid=os.getpid(),
        phase="ready",
        layout=layout,
    )
