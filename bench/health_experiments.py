"""What is done to a real server, and what each health endpoint has to say to it, and how soon."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from bench.health_latency import PROBERS, crowd
from bench.health_probes import CHECKS, PAGES, SILENCE, Probes
from bench.jumpy_clock import JumpyClock
from bench.kit import Server, Workplace
from cache_server.config import Config
from cache_server.detection import detection
from cache_server.shm import RETRY_S
from cache_server.vitals import LOOP_TURN_MS, TURN_MS

SMALL_FILE_SYSTEM = "80m"  # the arena fits into it, as long as nobody else fills it
POPULATE_HELD_S = 12.0  # of the start, so that it can be filled meanwhile
HEEDED_WITHIN_S = 30.0
JUMP_S = 3_600
CROWDED_S = 10.0
EXECS = tuple(f"check --{kind}" for kind in CHECKS)
BEGIN, END = "begin", "end"


class Bound(NamedTuple):
    endpoint: str
    said: str
    within_ms: float | None  # as documented; None: it says that, and nobody promises when
    since: str = BEGIN


@dataclass
class Rig:
    """One fresh server that is asked throughout, and the moments that bounds count from."""

    place: Workplace
    server: Server
    port: int
    config: Config
    probes: Probes
    moments: dict[str, float] = field(default_factory=dict)
    notes: dict[str, object] = field(default_factory=dict)

    def note(self, moment: str) -> None:
        self.moments[moment] = time.monotonic()

    def fault(self, part: str, order: str) -> None:
        """It begins when the part's thread has seen it."""
        file = self.server.runtime_dir / f"fault.{part}"
        fresh = file.with_name(f".{part}")
        fresh.write_text(order)
        fresh.rename(file)
        end_s = time.monotonic() + HEEDED_WITHIN_S
        while file.exists():
            if time.monotonic() > end_s:
                raise TimeoutError(f"nobody heeds {file.name}")
            time.sleep(0.001)
        self.note(BEGIN)


class Experiment:
    name = ""
    directory = "cs"
    # What may be said by any endpoint for a time, beside what the bounds name.
    also: frozenset[str] = frozenset()
    well_before = True  # it begins when all endpoints are content

    @contextmanager
    def prepared(self, place: Workplace) -> Iterator[None]:
        """What is there before the server is."""
        yield

    def act(self, rig: Rig) -> None:
        raise NotImplementedError

    def bounds(self, config: Config) -> list[Bound]:
        """None at all: whatever it is, the endpoints have nothing to say to it."""
        return []


class StuckLoop(Experiment):
    name = "the main loop stands still for 60 s"
    seconds = 60.0

    def act(self, rig: Rig) -> None:
        rig.fault("loop", f"{self.seconds}")
        rig.moments[END] = rig.moments[BEGIN] + self.seconds
        time.sleep(self.seconds + 8)

    def bounds(self, config: Config) -> list[Bound]:
        found = detection(config)
        unready_ms, dead_ms = found.loop_still_unready_ms, found.loop_still_dead_ms
        return [
            *(Bound(page, "503 late", unready_ms) for page in ("/ready", "/health")),
            *(Bound(page, "503 stalled", dead_ms) for page in ("/ready", "/health", "/live")),
            Bound("check --ready", "exit 1", unready_ms),
            Bound("check --deep", "exit 1", unready_ms + config.canary_deadline),
            Bound("check --live", "exit 1", dead_ms),
            Bound("/live", "200 ok", LOOP_TURN_MS, END),
            Bound("check --live", "exit 0", LOOP_TURN_MS + TURN_MS, END),
            *(Bound(page, "200 ok", LOOP_TURN_MS + TURN_MS, END) for page in ("/ready", "/health")),
            *(Bound(f"check --{kind}", "exit 0", LOOP_TURN_MS + TURN_MS, END) for kind in ("ready", "deep")),
        ]


class Stopped(Experiment):
    name = "the process is stopped (SIGSTOP) for 15 s"

    def act(self, rig: Rig) -> None:
        os.kill(rig.server.pid, signal.SIGSTOP)
        rig.note(BEGIN)
        time.sleep(15)
        os.kill(rig.server.pid, signal.SIGCONT)
        rig.note(END)
        time.sleep(8)

    def bounds(self, config: Config) -> list[Bound]:
        found = detection(config)
        return [
            *(Bound(page, SILENCE, None) for page in PAGES),
            Bound("check --ready", "exit 1", found.process_stopped_unready_ms),
            Bound("check --deep", "exit 1", found.process_stopped_unready_ms + config.canary_deadline),
            Bound("check --live", "exit 1", found.process_stopped_dead_ms),
            *(Bound(page, "200 ok", LOOP_TURN_MS, END) for page in PAGES),
            *(Bound(check, "exit 0", LOOP_TURN_MS + TURN_MS, END) for check in EXECS),
        ]


class NoMemory(Experiment):
    name = "the memory file system is full for 8 s"
    directory = "small/cs"
    also = frozenset({"503 starting", "exit 1"})
    well_before = False

    @contextmanager
    def prepared(self, place: Workplace) -> Iterator[None]:
        directory = place.path / self.directory
        mount = directory.parent
        mount.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={SMALL_FILE_SYSTEM}"]
        subprocess.run(["mount", *options, "tmpfs", mount], check=True)
        try:
            directory.mkdir(mode=0o700)
            (directory / "fault.populate").write_text(f"{POPULATE_HELD_S}")
            yield
        finally:
            subprocess.run(["umount", "--lazy", mount], check=True)

    def act(self, rig: Rig) -> None:
        """The arena's memory is first touched when all of it has been given to somebody else."""
        filler = rig.server.runtime_dir.parent / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        # The populate thread's sleep began a little later: what is measured errs to the long side.
        rig.moments[BEGIN] = rig.server.began_s + POPULATE_HELD_S
        time.sleep(rig.moments[BEGIN] + 8 - time.monotonic())
        filler.unlink()
        rig.note(END)
        time.sleep(RETRY_S + 5)

    def bounds(self, config: Config) -> list[Bound]:
        found = detection(config)
        again_ms = RETRY_S * 1_000 + found.memory_ms
        return [
            *(Bound(page, "503 memory", found.memory_ms) for page in ("/ready", "/health")),
            Bound("check --ready", "exit 1", found.memory_ms),
            *(Bound(page, "200 ok", again_ms, END) for page in ("/ready", "/health")),
            Bound("check --ready", "exit 0", again_ms + TURN_MS, END),
        ]


class DeadHttp(Experiment):
    name = "the HTTP thread dies"

    def act(self, rig: Rig) -> None:
        rig.fault("http", "die")
        time.sleep(8)

    def bounds(self, config: Config) -> list[Bound]:
        deep_ms = TURN_MS + config.canary_deadline
        return [
            *(Bound(page, SILENCE, None) for page in PAGES),
            *(Bound(f"check --{kind}", "exit 1", TURN_MS) for kind in ("live", "ready")),
            Bound("check --deep", "exit 1", deep_ms),
        ]


class DeadCanary(Experiment):
    name = "the canary's thread dies"

    def act(self, rig: Rig) -> None:
        rig.fault("canary", "die")
        time.sleep(detection(rig.config).path_broken_ms / 1_000 + 3)

    def bounds(self, config: Config) -> list[Bound]:
        unproven_ms = detection(config).path_broken_ms
        return [
            *(Bound(page, "200 dead", TURN_MS) for page in ("/ready", "/health")),
            *(Bound(page, "503 unproven", unproven_ms) for page in ("/ready", "/health")),
            Bound("check --ready", "exit 1", unproven_ms),
            Bound("check --deep", "exit 1", unproven_ms + config.canary_deadline),
        ]


class ClockJumps(Experiment):
    name = "the wall clock jumps: +1 h, -1 h from the true time, and back"

    def __init__(self) -> None:
        self._clock: JumpyClock | None = None

    @contextmanager
    def prepared(self, place: Workplace) -> Iterator[None]:
        self._clock = JumpyClock(place.path)
        place.environment |= self._clock.environment
        yield

    def act(self, rig: Rig) -> None:
        assert self._clock is not None
        rig.note(BEGIN)
        for jump_s in (JUMP_S, -JUMP_S, 0):
            self._clock.jump_to(jump_s)
            rig.notes[f"asked for {jump_s:+} s"] = f"{wall_clock_error_s(rig.place):+.0f} s"
            time.sleep(5)


def wall_clock_error_s(place: Workplace) -> float:
    """As a process in the server's environment sees it."""
    command = [sys.executable, "-c", "import time; print(time.time())"]
    environment = {**os.environ, **place.environment}
    seen = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    return float(seen) - time.time()


class Crowd(Experiment):
    name = "200 probers at once, for 10 s"

    def act(self, rig: Rig) -> None:
        rig.note(BEGIN)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rig.notes |= pool.apply(crowds, (rig.port, CROWDED_S))


def crowds(port: int, seconds: float) -> dict[str, float]:
    """Again as soon as all have their answers."""
    end_s = time.monotonic() + seconds
    rounds: list[dict[str, float]] = []
    while time.monotonic() < end_s:
        rounds.append(crowd(port))
    return {
        "asked": PROBERS * len(rounds),
        "answered": sum(each["answered"] for each in rounds),
        "slowest_of_all_ms": max(each["all_ms"] for each in rounds),
    }


EXPERIMENTS = (StuckLoop, Stopped, NoMemory, DeadHttp, DeadCanary, ClockJumps, Crowd)
