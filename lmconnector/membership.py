"""How one process of the engine becomes known to the server: presence, registration, heartbeat."""

import contextlib
import errno
import logging
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec

from cache_server.protocol import messages as m
from cache_server.protocol.presence import Presence, presence_name
from lmconnector.arena import ArenaMap
from lmconnector.client import ask
from lmconnector.config import Options
from lmconnector.errors import ONE_USER, RegistrationError, UnavailableError
from lmconnector.heartbeat import Heartbeat, Membership, monotonic_ms
from lmconnector.link import Link, ZmqLink
from lmconnector.transfer import Transfer

log = logging.getLogger(f"vllm.{__name__}")

ANNOUNCE_MS = 200  # an engine's start waits no longer for a server that is not there
UNREGISTER_MS = 200  # nor does its end


class Member:
    """Registers in the heartbeat's time, again whenever it must; `map` is the last one that was mapped."""

    def __init__(
        self,
        options: Options,
        registration: m.Register,
        transfer: Transfer | None = None,
        new_link: Callable[[], Link] | None = None,
        clock: Callable[[], int] = monotonic_ms,
    ) -> None:
        """`registration`: all but its proof; `transfer`: a worker's."""
        self.map: ArenaMap | None = None
        self.arena = b""  # the id of the one that the server serves
        self.runtime_dir = Path(options.dir)
        self._registration = registration
        self._transfer = transfer
        self._presence: Presence | None = None
        self._attaching: threading.Thread | None = None  # the last one
        self._new_link = new_link or partial(ZmqLink, self.runtime_dir)
        self._clock = clock
        self._timing = options.timing
        self._deadline_ms = options.request_deadline_ms
        self._told_silent_after_ms = 0  # of a server that takes us for silent
        self.heartbeat = Heartbeat(self._new_link, self._register, self._timing, clock)

    def announce(self) -> None:
        """Tells the server, if it is there, that this process warms up: it will hear nothing until that is
        over, and has its lock to go by."""
        try:
            self._ask_to_register("warming", ANNOUNCE_MS)
        except RegistrationError as error:
            log.info("register: warming up without the cache server: %s", error)

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

    def close(self, *, copies_ended: bool = True) -> None:
        """The heartbeat first, or it would register again; the proof that we live last, and not before the
        process's end if a copy may still write: what is reserved for it would be given to others."""
        self.heartbeat.stop(timeout_ms=1_000)
        membership = self.heartbeat.membership
        if membership is not None:
            link = self._new_link()
            try:
                with contextlib.suppress(UnavailableError):  # it will see our lock go
                    ask(link, m.Unregister(id=1, session=membership.session), UNREGISTER_MS, self._clock)
            finally:
                link.close()
        if self._presence is not None and copies_ended:
            self._presence.close()

    def _register(self) -> Membership:
        reply = self._ask_to_register("ready", self._deadline_ms)
        if self._transfer is not None and (self.map is None or self.map.id != reply.arena.id):
            old, self.map = self.map, ArenaMap.open(reply.arena)
            # It can be used at once; made fast, which may take long, it is beside that.
            attach = partial(self._attach, self._transfer, self.map, old, self._attaching)
            self._attaching = threading.Thread(target=attach, name="lmconnector-attach", daemon=True)
            self._attaching.start()
        self.arena = reply.arena.id
        self._compare(reply.silent_after_ms)
        return Membership(reply.session, reply.boot)

    def _compare(self, silent_after_ms: int) -> None:
        """Two pings may be lost before the server takes us for silent; else it does so again and again."""
        needed_ms = self._timing.silence_ms_max
        if needed_ms > silent_after_ms != self._told_silent_after_ms:
            self._told_silent_after_ms = silent_after_ms
            log.warning(
                "register: pings come every heartbeat_interval_s = %.3g s, and the server takes us for silent"
                " after %.3g s: give the engine a shorter interval, or the server --silent-after %.3gs",
                self._timing.interval_ms / 1_000, silent_after_ms / 1_000, needed_ms / 1_000,
            )  # fmt: skip

    def _attach(
        self, transfer: Transfer, new: ArenaMap, old: ArenaMap | None, before: threading.Thread | None
    ) -> None:
        """Arenas may follow each other faster than threads start: an old one may only now be attached."""
        if old is not None:
            transfer.detach(old)
            if before is not None:
                before.join()
                transfer.detach(old)
        if new is self.map:
            transfer.attach(new)

    def _ask_to_register(self, phase: m.Phase, deadline_ms: int) -> m.Registered:
        request = msgspec.structs.replace(self._registration, proof=self._proof(), phase=phase)
        link = self._new_link()
        try:
            reply = ask(link, request, deadline_ms, self._clock)
        except UnavailableError as error:
            raise RegistrationError(str(error)) from error
        finally:
            link.close()
        if isinstance(reply, m.Refused):
            raise RegistrationError(f"{reply.code}: {reply.detail}")
        if not isinstance(reply, m.Registered):
            raise RegistrationError(f"REGISTER was answered by {type(reply).__name__}")
        return reply

    def _proof(self) -> str:
        """A file that the server finds.  The old one is let go first, or the server would see two of us."""
        old = self._presence
        if old is None or not old.in_place:
            try:
                self._presence = Presence(self.runtime_dir, presence_name(self._registration.engine))
            except OSError as error:
                raise RegistrationError(_why_no_presence(error, self.runtime_dir)) from error
            if old is not None:
                old.close()
        assert self._presence is not None
        return self._presence.name


def _why_no_presence(error: OSError, runtime_dir: Path) -> str:
    """Of the directory: a file has another name with each attempt, and each would be told as news."""
    place = Path(error.filename).parent if error.filename else runtime_dir
    advice = {
        errno.ENOENT: ": is a server running there?",
        errno.EACCES: f": {ONE_USER}",
        errno.EPERM: f": {ONE_USER}",
    }
    return f"{place}: {error.strerror}{advice.get(error.errno or 0, '')}"


def registration(
    engine: str, rank: int, world: int, namespace: bytes, layout: m.Layout | None = None, instance: str = ""
) -> m.Register:
    """With a layout: a worker's; without: the scheduler's.  `instance`: another one for each start of the
    engine, and the same in all its processes."""
    return m.Register(
        id=1,
        version_min=m.VERSION_MIN,
        version_max=m.VERSION_MAX,
        engine=engine,
        instance=instance,
        role="worker" if layout else "scheduler",
        rank=rank,
        world=world,
        namespace=namespace,
        proof="none yet",
        pid=os.getpid(),
        layout=layout,
    )
