"""Who looks on: at vLLM's log as it is written, and at what the processes hold."""

import contextlib
import os
import re
import threading
import time
from pathlib import Path

from chaos.campaign.record import Sample
from lmconnector.demo.healthlog import read_change
from lmconnector.demo.timeline import Change

LOOK_S = 0.005
IN_MEMORY = ("/dev/shm/", "/memfd:", "/tmp/")  # mapped from there: the arena, and what vLLM shares
BEATS = re.compile(r"^(\w+) pid=(\d+)$")


class Witness:
    """Stamps each change of health with the time at which its line was there.

    Threading model: one thread reads the log and appends to `changes`; others only look at the list.
    """

    def __init__(self, log: Path) -> None:
        self.changes: list[Change] = []  # by the monotonic clock
        self._log = log
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> "Witness":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def processes(self) -> dict[str, int]:
        """Those of the engine that have a heartbeat."""
        found = {each.process: BEATS.match(each.process) for each in self.changes}
        return {match[1]: int(match[2]) for match in found.values() if match}

    def _read(self) -> None:
        with self._log.open(errors="replace") as log:
            begun = ""
            while not self._ended.wait(LOOK_S):
                while line := log.readline():
                    begun += line
                    if not begun.endswith("\n"):
                        break
                    if change := read_change(begun, time.monotonic()):
                        self.changes.append(change)
                    begun = ""


def sample(process: str, pid: int, at_s: float) -> Sample | None:
    """None: it has just ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError, KeyError):  # a zombie has no memory
        proc = Path(f"/proc/{pid}")
        status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
        maps = (line.split(maxsplit=5) for line in (proc / "maps").read_text().splitlines())
        return Sample(
            at_s=at_s,
            process=process,
            pid=pid,
            files=len(os.listdir(proc / "fd")),
            threads=int(status["Threads"]),
            shared=len(
                {(map_[3], map_[4]) for map_ in maps if len(map_) > 5 and map_[5].startswith(IN_MEMORY)}
            ),
            rss_mib=round(int(status["RssAnon"].split()[0]) / 1_024, 1),
        )
    return None
