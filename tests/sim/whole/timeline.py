"""Simulated time: what happens when.  Whoever waits lets everything else happen meanwhile."""

import heapq
import itertools
from collections.abc import Callable


class Timeline:
    def __init__(self) -> None:
        self.now_ms = 1_000
        self.stalled_ms = 0  # while somebody stood still in the midst of something: all others went on
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._tie = itertools.count()

    def __len__(self) -> int:
        return len(self._events)

    def clock(self) -> int:
        return self.now_ms

    def at(self, at_ms: int, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_ms, next(self._tie), what))

    def after(self, ms: int, what: Callable[[], None]) -> None:
        self.at(self.now_ms + ms, what)

    def stall(self, ms: int) -> None:
        """Whoever calls it stands still; who waits for something further out in the stack does so as well."""
        began_ms, before_ms = self.now_ms, self.stalled_ms
        self.run_until(began_ms + ms)
        self.stalled_ms = before_ms + self.now_ms - began_ms  # the stalls within it are a part of it

    def run_until(self, until_ms: int, enough: Callable[[], bool] = lambda: False) -> None:
        """Also from within an event: that is how somebody waits."""
        while not enough():
            if not self._events or self._events[0][0] > until_ms:
                self.now_ms = max(self.now_ms, until_ms)
                return
            at_ms, _, what = heapq.heappop(self._events)
            self.now_ms = max(self.now_ms, at_ms)
            what()
