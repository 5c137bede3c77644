"""Requests and their replies over a link: matched by id, each with a deadline, none waited for unless asked.

A client belongs to the thread that made its link.
"""

from collections.abc import Callable

from cache_server.protocol import messages as m
from lmconnector.errors import UnavailableError
from lmconnector.link import EVENTS_MAX, Connected, Garbage, Link

OnReply = Callable[[m.Reply | None], None]  # None: not sent, or no reply in time
PENDING_MAX = 4_096


class Client:
    def __init__(self, link: Link, clock: Callable[[], int]) -> None:
        self._link = link
        self._clock = clock
        self._last_id = 0
        self._pending: dict[int, tuple[int, OnReply]] = {}
        self.on_stray: Callable[[m.Reply], None] = lambda _reply: None  # to nothing that is waited for

    def next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def send(self, request: m.Request, deadline_ms: int, on_reply: OnReply) -> None:
        """`on_reply` is called exactly once, in this call or in a later `poll`."""
        if len(self._pending) >= PENDING_MAX or not self._link.send(request):
            on_reply(None)
        else:
            self._pending[request.id] = (self._clock() + deadline_ms, on_reply)

    def poll(self, timeout_ms: int) -> None:
        awaited = 0
        for event in self._link.poll(timeout_ms):
            if isinstance(event, m.Reply):
                pending = self._pending.pop(event.id, None)
                awaited += pending is not None
                (pending[1] if pending else self.on_stray)(event)
        if awaited == EVENTS_MAX:
            return  # more may lie there: what has come is not late
        now_ms = self._clock()
        overdue = [id_ for id_, (deadline_ms, _) in self._pending.items() if now_ms >= deadline_ms]
        for id_ in overdue:
            self._pending.pop(id_)[1](None)

    def close(self) -> None:
        self._pending.clear()
        self._link.close()


def ask(link: Link, request: m.Request, deadline_ms: int, clock: Callable[[], int]) -> m.Reply:
    """One request over a link of its own, waited for; raises `UnavailableError`."""
    until_ms = clock() + deadline_ms
    sent = link.send(request)
    strange = ""
    while (left_ms := until_ms - clock()) > 0:
        for event in link.poll(left_ms):
            if isinstance(event, Connected) and not sent:
                sent = link.send(request)
            if isinstance(event, Garbage):
                strange = f"; what listens there sends bytes that are no reply: {event.detail}"
            if isinstance(event, m.Reply) and event.id == request.id:
                return event
    raise UnavailableError(f"no answer from the cache server within {deadline_ms} ms{strange}")
