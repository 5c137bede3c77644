"""What was stored before the weights changed is not found again.  vLLM's scheduler thread only.

Rule 1: an engine's keys begin with an epoch.  The first is everybody's: its weights are as they were loaded.
Rule 2: a reset draws an epoch that nobody else has: what others' weights are by now, nobody here knows.
Rule 3: the server is told to clear the old ones until it has: who starts anew has the first epoch again.
"""

import logging
import secrets
from collections import Counter
from collections.abc import Callable

from cache_server.protocol import messages as m
from lmconnector.client import Client
from lmconnector.gate import RETRY_MS, Gate, note_failure

log = logging.getLogger(f"vllm.{__name__}")

FIRST = 0
EPOCH_BITS = 47


def draw() -> int:
    return 1 + secrets.randbits(EPOCH_BITS)


class Epochs:
    def __init__(
        self, client: Client, gate: Gate, counts: Counter[str], deadline_ms: int, draw: Callable[[], int]
    ) -> None:
        self.now = FIRST
        self._client = client
        self._gate = gate
        self._counts = counts
        self._deadline_ms = deadline_ms
        self._draw = draw
        self._stale: list[int] = []  # that the server has not cleared yet, oldest first
        self._asked = False
        self._not_before_ms = 0

    def begin_anew(self, now_ms: int) -> bool:
        """-> whether the server could be told"""
        self._stale.append(self.now)
        del self._stale[1:-1]  # nobody asks for these again: they leave when room is needed
        self.now = self._draw()
        self._not_before_ms = 0
        self.tell(now_ms)
        if not self._asked:
            log.warning(
                "reset: the cache server can't be told now, and will be when it is back; until then an engine"
                " that starts anew would find what was stored before"
            )
        return self._asked

    def tell(self, now_ms: int) -> None:
        if not self._stale or self._asked or now_ms < self._not_before_ms or not self._gate.usable:
            return
        epoch = self._stale[0]
        clear = m.Clear(id=self._client.next_id(), session=self._gate.session, epoch=epoch)

        def take(reply: m.Reply | None) -> None:
            self._asked = False
            if isinstance(reply, m.Done):
                self._stale = [other for other in self._stale if other != epoch]
                return
            self._not_before_ms = now_ms + RETRY_MS
            self._counts[f"drops/{note_failure(self._gate, clear, reply)}"] += 1

        self._asked = True
        self._client.send(clear, self._deadline_ms, take)
