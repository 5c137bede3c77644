"""Faults on demand, for tests of a real server: off unless the environment says CACHE_SERVER_DEBUG_FAULTS=1.

A file `fault.<part>` in the runtime dir that holds a number of seconds makes that part's thread stand still
for so long, `busy` and a number that it does so under a lease, `gil` and a number that no thread of the
process runs meanwhile; `die` ends the thread.  The file is removed when it is heeded.
"""

import contextlib
import os
import select
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

SWITCH = "CACHE_SERVER_DEBUG_FAULTS"
FAULT = "fault."
SECONDS_MAX = 3_600.0
GIL_SECONDS_MAX = 60.0


Leased = Callable[[str, int], AbstractContextManager[None]]


def unleased(_name: str, _lease_ms: int) -> AbstractContextManager[None]:
    return contextlib.nullcontext()


class Faults:
    def __init__(self, runtime_dir: Path) -> None:
        self._dir = runtime_dir if os.environ.get(SWITCH) == "1" else None

    def at(self, part: str, leased: Leased = unleased) -> None:
        if self._dir is None:
            return
        file = self._dir / f"{FAULT}{part}"
        with contextlib.suppress(FileNotFoundError, ValueError):
            order = file.read_text().strip()
            file.unlink()
            if order == "die":
                raise SystemExit
            kind, _, number = order.rpartition(" ")
            seconds = min(float(number), SECONDS_MAX)
            match kind:
                case "gil":
                    _hold_the_interpreter(min(seconds, GIL_SECONDS_MAX))
                case "busy":
                    with leased("fault", int(seconds * 1_000)):
                        select.select([], [], [], seconds)
                case _:
                    select.select([], [], [], seconds)


def _hold_the_interpreter(seconds: float) -> None:
    """As an extension's call does that keeps the interpreter's lock."""
    import ctypes  # noqa: PLC0415  nobody else needs it

    ctypes.PyDLL(None).usleep(int(seconds * 1e6))
