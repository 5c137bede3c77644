"""A campaign at work: a stage, a `vllm serve` on it, its traffic, and who looks on."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from cache_server.client import UnreachableError
from cache_server.protocol.presence import LOCKS
from cache_server.report import Status
from chaos.campaign.record import Sample
from chaos.campaign.stage import Stage, stage
from chaos.campaign.traffic import Load
from chaos.campaign.witness import Witness, sample
from e2e.kit import connector
from e2e.serving import Serving

HITS_DEADLINE_S = 90.0
SAMPLE_EVERY_S = 5.0
LOOK_S = 0.02


@dataclass
class Scene:
    stage: Stage
    serving: Serving
    witness: Witness
    load: Load
    since_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    unaccounted_bytes: int = 0
    _sampled_s: float = 0.0

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.since_s

    def until_a_hit(self) -> float | None:
        """-> when the request began that was one"""
        healed_s = time.monotonic()
        while time.monotonic() < healed_s + HITS_DEADLINE_S:
            self.stage.wait(LOOK_S)
            self.stage.revive()
            for one in reversed(self.load.asked):
                if one.began_s < healed_s:
                    break
                if one.hit:
                    return one.began_s - self.since_s
        return None

    def look(self) -> None:
        """At what all processes hold, now that nothing is wrong."""
        if time.monotonic() < self._sampled_s + SAMPLE_EVERY_S:
            return
        self._sampled_s = time.monotonic()
        pids = {"cache server": self.stage.cache.pid, "front end": self.serving.process.pid}
        for process, pid in {**pids, **self.witness.processes}.items():
            if taken := sample(process, pid, self.now_s):
                self.samples.append(taken)
        if status := self.status():
            arena = status.arena
            parts = arena.free_bytes + arena.used_bytes + arena.quarantined_bytes
            self.unaccounted_bytes = max(self.unaccounted_bytes, abs(arena.capacity_bytes - parts))

    def status(self) -> Status | None:
        with contextlib.suppress(UnreachableError):
            return self.stage.cache.status()
        return None

    def strange_locks(self) -> int:
        """Of processes that are no more; the engine's own and the canary's are left out."""
        files = (self.stage.cache.runtime_dir / LOCKS).iterdir()
        pids = {str(pid) for pid in (*self.witness.processes.values(), self.stage.cache.pid)}
        return sum(not pids & set(file.name.split(".")) for file in files)

    def errors_of_the_server(self) -> int:
        words = self.stage.cache.log.read_text(errors="replace")
        return words.count("Traceback") + words.count("internal error")


@contextlib.contextmanager
def scene(model: Path, logs: Path, pool: list[list[int]], random: Random, pace_s: float) -> Iterator[Scene]:
    """All of it runs, but for the traffic."""
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(stage(random.getrandbits(32)))
        stack.callback(lambda: shutil.copyfile(made.cache.log, logs / "server.log"))
        serving = Serving(
            logs / "serve.log",
            model.with_name("stubs"),
            model,
            connector(made.front),
            more=["--no-enable-prefix-caching"],
        )
        witness = stack.enter_context(Witness(serving.log))
        stack.enter_context(serving)
        yield Scene(made, serving, witness, Load(serving, pool, random, pace_s))
