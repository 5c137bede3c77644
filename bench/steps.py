"""What vLLM's scheduler thread spends in the connector: `python -m bench.steps --out FILE.json [--quick]`.

The connector's real scheduler side, client, link and heartbeats, and a real server process.  The requests,
the engine's blocks, and the workers, which say at once that all is done, are models.  All kinds of steps are
taken in turn.  `wall` less `waited` is the connector's own; what it waits for is the answer to LOOKUP, and
nothing else is to do meanwhile here.
"""

import argparse
import itertools
import json
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.kit import Server, bounded, machine, percentile, provenance, workplace
from bench.picture import Bar, Chart, picture
from cache_server.protocol import messages as m
from cache_server.protocol.keys import HASH_BYTES
from lmconnector.client import Client
from lmconnector.config import Options
from lmconnector.geometry import ChunkLayout, GroupLayout
from lmconnector.heartbeat import monotonic_ms
from lmconnector.link import Event, ZmqLink
from lmconnector.membership import Member, registration
from lmconnector.metadata import Outcome, Plan
from lmconnector.pace import Pace
from lmconnector.scheduler import Scheduled, SchedulerSide
from lmconnector.stores import Surroundings

BLOCK_TOKENS, BLOCKS_PER_CHUNK = 16, 16
PART_BYTES = 4096  # nobody writes or reads the chunks: their size does not matter
LAYOUT = ChunkLayout(
    BLOCK_TOKENS * BLOCKS_PER_CHUNK, BLOCK_TOKENS, (GroupLayout(BLOCK_TOKENS, BLOCKS_PER_CHUNK, 0),)
)
PROMPT_TOKENS = 8_192
RUNNING = 64  # requests that decode in every step
STORED_PROMPTS = 8
HEALTH_DEADLINE_S = 20.0
DEADLINE_S = 600
TARGETS_MS = {"healthy": 0.2, "degraded": 0.02}


@dataclass
class Prompt:
    request_id: str
    block_hashes: list[bytes]
    num_tokens: int = PROMPT_TOKENS
    scheduled_tokens: int = PROMPT_TOKENS
    skip_reading_prefix_cache: bool = False
    blocks: list[int] = field(default_factory=lambda: list(range(1, 1 + PROMPT_TOKENS // BLOCK_TOKENS)))

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_tokens


class NoBlocks:
    """vLLM's pool, which is not measured here."""

    def hold(self, blocks: Sequence[int]) -> None: ...

    def let_go(self, blocks: Sequence[int]) -> None: ...

    def forget(self, blocks: Sequence[int]) -> None: ...


class WatchedLink(ZmqLink):
    """Knows for how long it was waited at."""

    waited_ns = 0

    def poll(self, timeout_ms: int) -> list[Event]:
        if not timeout_ms:
            return super().poll(0)
        began_ns = time.perf_counter_ns()
        try:
            return super().poll(timeout_ms)
        finally:
            self.waited_ns += time.perf_counter_ns() - began_ns


class Engine:
    def __init__(self, runtime_dir: Path) -> None:
        options = Options(dir=str(runtime_dir))
        layout = m.Layout(groups=(m.Group(PART_BYTES, 0),))
        self.worker = Member(options, registration("steps", 0, 1, b"bench", layout))
        self.member = Member(options, registration("steps", 0, 1, b"bench"))
        for member in (self.worker, self.member):
            member.heartbeat.ensure_started()
        self.until(lambda: self.worker.usable and self.member.usable)
        self.link = WatchedLink(runtime_dir)
        self.client = Client(self.link, monotonic_ms)
        around = Surroundings(
            options, LAYOUT, self.client, self.member, NoBlocks(),
            workers=1, caches_locally=True, steps_overlap=True, clock=monotonic_ms,
        )  # fmt: skip
        self.side = SchedulerSide(around, Pace(PART_BYTES // BLOCKS_PER_CHUNK))
        self.times: dict[str, list[tuple[int, int, int]]] = defaultdict(list)  # ns of wall, waiting, CPU
        self._random = random.Random(1)
        self._numbers = itertools.count()
        self.running = [self.prompt() for _ in range(RUNNING)]
        for prompt in self.running:
            self.done(self.arrive(prompt))
            prompt.scheduled_tokens += 1  # it decodes
            self.settle()

    def prompt(self, block_hashes: list[bytes] | None = None) -> Prompt:
        hashes = block_hashes or [
            self._random.randbytes(HASH_BYTES) for _ in range(PROMPT_TOKENS // BLOCK_TOKENS)
        ]
        return Prompt(f"request-{next(self._numbers)}", hashes)

    def until(self, holds: Callable[[], bool]) -> None:
        end_s = time.perf_counter() + HEALTH_DEADLINE_S
        while not holds():
            if time.perf_counter() > end_s:
                raise TimeoutError("the connector's health did not become what was waited for")
            time.sleep(0.01)

    @contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        waited_ns, wall_ns, cpu_ns = self.link.waited_ns, time.perf_counter_ns(), time.thread_time_ns()
        yield
        cpu_ns = time.thread_time_ns() - cpu_ns
        wall_ns = time.perf_counter_ns() - wall_ns
        self.times[kind].append((wall_ns, self.link.waited_ns - waited_ns, cpu_ns))

    def decode(self) -> Plan:
        """One step in which nothing is new."""
        plan = self.side.take_loads()
        self.side.add_stores(plan, self.scheduled(self.running))
        return plan

    def scheduled(self, prompts: Sequence[Prompt]) -> Iterator[Scheduled]:
        """As `bridge.scheduled` takes them from vLLM's output."""
        if self.side.storing:
            for prompt in prompts:
                if prompt.request_id in self.side.storing:
                    yield prompt.request_id, prompt.scheduled_tokens, lambda prompt=prompt: [prompt.blocks]

    def arrive(self, prompt: Prompt) -> Plan:
        """One step that takes up this request, beside those that run."""
        side = self.side
        side.on_new_request(prompt)
        matched, _ = side.matched_tokens(prompt, 0)
        while matched is None:
            self.done(self.decode())
            matched, _ = side.matched_tokens(prompt, 0)
        side.on_allocated(prompt, [prompt.blocks], matched)
        plan = side.take_loads()
        side.add_stores(plan, self.scheduled([*self.running, prompt]))
        return plan

    def done(self, plan: Plan) -> None:
        """The workers' word, in the same thread."""
        jobs = Counter(job.number for job in (*plan.loads, *plan.stores))
        if jobs:
            self.side.on_outcome(Outcome(ended=jobs))

    def settle(self) -> None:
        """All answers are in and the stock is full, as between two requests of a real engine."""
        for _ in range(10):
            self.decode()
            time.sleep(0.001)


def healthy(engine: Engine, rounds: int) -> None:
    stored = [engine.prompt() for _ in range(STORED_PROMPTS)]
    for prompt in stored:
        _arrives(engine, "warm-up", prompt)
    for number in range(rounds):
        for kind, hashes in (("miss", None), ("hit", stored[number % STORED_PROMPTS].block_hashes)):
            _arrives(engine, kind, engine.prompt(hashes))
            for _ in range(10):
                with engine.timed("decode"):
                    engine.decode()
    counts = engine.side.counts
    assert counts["lookups/hit"] >= rounds, counts
    assert counts["chunks_stored"] >= rounds, counts


def _arrives(engine: Engine, kind: str, prompt: Prompt) -> None:
    with engine.timed(kind):
        plan = engine.arrive(prompt)
    with engine.timed(f"{kind}, its end"):
        engine.done(plan)
        engine.side.on_finished(prompt.request_id)
    engine.settle()


def degraded(engine: Engine, rounds: int) -> None:
    for _ in range(rounds):
        prompt = engine.prompt()
        with engine.timed("degraded, arrival"):
            plan = engine.arrive(prompt)
        assert not plan.loads
        assert not plan.stores
        with engine.timed("degraded, its end"):
            engine.side.on_finished(prompt.request_id)
        for _ in range(10):
            with engine.timed("degraded, decode"):
                engine.decode()


def measure(*, quick: bool) -> dict:
    rounds = 50 if quick else 1_000
    with workplace() as place:
        server = Server(place, "steps", "1GiB")
        server.wait_populated()
        engine = Engine(server.runtime_dir)
        healthy(engine, rounds)
        server.kill()
        engine.until(lambda: not engine.member.usable)
        degraded(engine, rounds)
        engine.side.close()
        for member in (engine.member, engine.worker):
            member.close()
    return {kind: figures(times) for kind, times in engine.times.items() if not kind.startswith("warm-up")}


def figures(times: Sequence[tuple[int, int, int]]) -> dict:
    columns = {
        "wall_us": [wall for wall, _, _ in times],
        "own_us": [wall - waited for wall, waited, _ in times],
        "cpu_us": [cpu for _, _, cpu in times],
    }
    return {
        "steps": len(times),
        **{
            name: {f"p{each}": round(percentile(taken, each) / 1_000, 1) for each in (50, 99)}
            for name, taken in columns.items()
        },
    }


def table(report: dict) -> str:
    lines = [
        f"{'step':22} {'wall us: p50':>14} {'p99':>8} {'own: p50':>10} {'p99':>8} {'CPU: p50':>10} {'p99':>8}"
    ]
    for kind, row in report.items():
        columns = [
            f"{row[name]['p50']:>10} {row[name]['p99']:>8}" for name in ("wall_us", "own_us", "cpu_us")
        ]
        lines.append(f"{kind:22}    " + " ".join([" " + columns[0], *columns[1:]]))
    return "\n".join(lines)


def chart(report: dict, note: str) -> Chart:
    """The bar ends at p50, its line at p99."""
    parts = {"wall": "wall_us", "without waiting": "own_us", "CPU": "cpu_us"}
    groups = {
        kind: [Bar(row[part]["p50"], row[part]["p50"], row[part]["p99"]) for part in parts.values()]
        for kind, row in report.items()
    }
    title = "A scheduler step's time in the connector: p50, and a line to p99"
    return Chart(title, "us", list(parts), groups, logarithmic=True, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, as JSON, and an SVG")
    parser.add_argument("--quick", action="store_true", help="few steps: a test of the bench")
    options = parser.parse_args()
    report: dict = {"machine": machine(), **provenance(), "quick": options.quick, "targets_ms": TARGETS_MS}
    with bounded(DEADLINE_S):
        report["steps"] = measure(quick=options.quick)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    note = f"{report['machine']['cpu']}, commit {report['commit'][:7]}"
    options.out.with_suffix(".svg").write_text(picture(chart(report["steps"], note)))
    print(table(report["steps"]), file=sys.stderr)


if __name__ == "__main__":
    main()
