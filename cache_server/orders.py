"""What the server is told by signals: to stop, to pause, to go on.

It outlives each `Server`: one that begins anew has been told the same.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

PAUSE, RESUME = signal.SIGUSR1, signal.SIGUSR2


class StoppedEarlyError(Exception):
    """Told to stop before it could serve: there is nothing to drain."""


class Orders:
    def __init__(self) -> None:
        self.stops = 0  # a second one is in a hurry
        self.pause_until_ms = 0
        self._at_once = False

    def stop(self) -> None:
        """Called by a signal's handler, between any two steps of the main thread."""
        self.stops += 1
        if self._at_once:
            self._at_once = False  # what it unwinds is not interrupted once more
            raise StoppedEarlyError

    @contextmanager
    def obeyed_at_once(self) -> Iterator[None]:
        """For what takes long and may be broken off anywhere: a stop ends it, also one that came before."""
        self._at_once = True
        try:
            if self.stops:
                raise StoppedEarlyError
            yield
        finally:
            self._at_once = False
