"""A visit to the server: a session as an engine of its own, in a namespace of its own.

What it leaves behind: nothing.  Its chunk is cleared and its slots are given back, and should it be killed,
the server takes the slots back by itself.
"""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef, pack_slot_names, split_slot_refs
from cache_server.protocol.presence import Presence, presence_name
from lmconnector.client import ask
from lmconnector.errors import UnavailableError
from lmconnector.heartbeat import monotonic_ms
from lmconnector.link import ZmqLink

R = TypeVar("R", bound=m.Reply)
DEADLINE_MS = 2_000
LEASE = "doctor"
LOOK = "look at the server's log"  # it says why it refuses what is in order


class RefusedError(Exception):
    def __init__(self, request: m.Request, refusal: m.Refused) -> None:
        super().__init__(f"{type(request).__name__.upper()} was refused: {refusal.code}: {refusal.detail}")
        self.code = refusal.code


class Visit:
    def __init__(self, runtime_dir: Path, clock: Callable[[], int] = monotonic_ms) -> None:
        self.engine = f"doctor-{os.getpid()}-{secrets.token_hex(4)}"
        self._runtime_dir = runtime_dir
        self._namespace = f"{self.engine} of lmconnector".encode()
        self._clock = clock
        self._link = ZmqLink(runtime_dir)
        self._last_id = 0
        self._presence: Presence | None = None
        self._session = 0

    def __enter__(self) -> "Visit":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._session:
                self._leave()
        except (UnavailableError, RefusedError):
            pass  # a server that is gone or does not know us holds nothing of ours that lives
        finally:
            self._link.close()
            if self._presence is not None:
                self._presence.close()

    def ping(self) -> m.Pong:
        return self._ask(m.Ping(id=self._next_id()), m.Pong)

    def status(self) -> dict[str, object]:
        return self._ask(m.Status(id=self._next_id(), workers=True), m.StatusReply).status

    def register(self, part_bytes: int) -> m.Registered:
        """Again with another size: takes the place of the first."""
        if self._presence is None:
            self._presence = Presence(self._runtime_dir, presence_name(self.engine))
        request = m.Register(
            id=self._next_id(),
            version_min=m.VERSION_MIN,
            version_max=m.VERSION_MAX,
            engine=self.engine,
            role="worker",
            namespace=self._namespace,
            proof=self._presence.name,
            pid=os.getpid(),
            phase="ready",
            layout=m.Layout(groups=(m.Group(part_bytes),), dtype="uint8"),
        )
        registered = self._ask(request, m.Registered)
        self._session = registered.session
        return registered

    def reserve(self, count: int) -> list[SlotRef]:
        request = m.Reserve(id=self._next_id(), session=self._session, count=count)
        return split_slot_refs(self._ask(request, m.Reserved).slots)

    def commit(self, hash_: bytes, slot: SlotRef) -> int:
        request = m.Commit(
            id=self._next_id(), session=self._session, hashes=hash_, slots=pack_slot_names([slot])
        )
        return self._ask(request, m.Committed).outcomes[0]

    def lookup(self, hash_: bytes) -> SlotRef | None:
        request = m.Lookup(id=self._next_id(), session=self._session, request=LEASE, hashes=hash_)
        found = self._ask(request, m.Found)
        return split_slot_refs(found.groups[0].slots)[0] if found.chunks else None

    def clear(self) -> int:
        return self._ask(m.Clear(id=self._next_id(), session=self._session), m.Done).count

    def _leave(self) -> None:
        session = self._session
        self._ask(m.Abort(id=self._next_id(), session=session, slots=b"", all_but=True), m.Done)
        self.clear()
        self._ask(m.Unregister(id=self._next_id(), session=session), m.Done)
        self._session = 0

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _ask(self, request: m.Request, expected: type[R]) -> R:
        """Raises `UnavailableError` and `RefusedError`."""
        reply = ask(self._link, request, DEADLINE_MS, self._clock)
        if isinstance(reply, m.Refused):
            raise RefusedError(request, reply)
        if not isinstance(reply, expected):
            asked, answered = type(request).__name__.upper(), type(reply).__name__.upper()
            raise UnavailableError(f"{asked} was answered by {answered}: no cache server of ours")
        return reply
