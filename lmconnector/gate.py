"""What the scheduler's side sees of the heartbeat, and what it tells it."""

from typing import Protocol

from cache_server.protocol import messages as m
from cache_server.protocol.messages import Code

RETRY_MS = 1_000  # until what came to nothing is asked again


class Gate(Protocol):
    @property
    def usable(self) -> bool: ...

    @property
    def session(self) -> int: ...

    @property
    def arena(self) -> bytes:
        """The id of the arena that the server serves."""
        ...

    def disappointed(self) -> None: ...

    def succeeded(self) -> None: ...

    def forgotten(self, session: int) -> None: ...


def note_failure(gate: Gate, request: m.Lookup | m.Commit | m.Clear, reply: m.Reply | None) -> str:
    """Lets the heartbeat draw its conclusions from a request that came to nothing; -> what to count it as."""
    op = type(request).__name__.lower()
    if reply is None:
        if (
            request.session == gate.session
        ):  # else its server is gone, and the one that is there was not asked
            gate.disappointed()
        return f"{op}_late"
    if isinstance(reply, m.Refused):
        if reply.code == Code.UNKNOWN_SESSION:
            gate.forgotten(request.session)
        return f"{op}_refused_{reply.code.lower()}"
    return f"{op}_answered_strangely"
