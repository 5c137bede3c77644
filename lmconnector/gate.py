"""What the scheduler's side sees of the heartbeat, and what it tells it."""

from collections import Counter
from typing import Protocol

from cache_server.protocol import messages as m
from cache_server.protocol.messages import Code


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


def note_failure(
    gate: Gate, counts: Counter[str], request: m.Lookup | m.Commit, reply: m.Reply | None
) -> None:
    """Counts a request that came to nothing, and lets the heartbeat draw its conclusions."""
    op = type(request).__name__.lower()
    if reply is None:
        counts[f"{op}_late"] += 1
        gate.disappointed()
    elif isinstance(reply, m.Refused):
        counts[f"{op}_refused_{reply.code.lower()}"] += 1
        if reply.code == Code.UNKNOWN_SESSION:
            gate.forgotten(request.session)
    else:
        counts[f"{op}_strange"] += 1
