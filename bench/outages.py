"""What outages of the cache server cost a real vLLM: `python -m bench.outages --out FILE.json`.

One request per second; the faults, vLLM and the clients are those of the end-to-end tests, the connector's
options are the defaults.  Beside it, what a missing server costs vLLM's start.  Prints a table for
docs/performance-outages.md, and draws its picture.
"""

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench.kit import ROOT, machine, provenance, spread
from bench.picture import Bar, Chart, picture

sys.path.append(str(ROOT / "tests"))

from e2e.faults import FAULTS
from e2e.kit import Engine, Plain
from e2e.outages import Outcome, rig
from e2e.serving import Serving
from lmconnector.demo.model import make

HEAD = (
    "fault",
    "requests",
    "hits",
    "failed",
    "wrong",
    "stuck",
    "> 1 s",
    "worst",
    "worst added",
    "hits again",
)
STARTS = 3  # of each kind


class Peer(NamedTuple):
    """LMCache 0.5.6 in multi-process mode with its default options, on a machine of the same kind."""

    says: str
    worst_s: tuple[float, float] | None = None  # the least and the most of its runs


PEER = {
    "absent at start": Peer("**vLLM does not start**, and ends after 329 s"),
    "none": Peer("0.40 s", (0.4, 0.4)),
    "killed idle": Peer("**13 to 23 s**, 15 to 26 requests over 1 s; in one run 31 of 50 stuck", (13, 23)),
    "killed in mid-store": Peer("**vLLM's engine dies** after 300 s"),
    "restarted at once": Peer("17.5 to 21 s, 17 to 21 requests over 1 s", (17.5, 21)),
    "frozen": Peer("**43 s** (of 40 s), 47 to 49 requests over 2 s: all wait until it wakes", (43, 43)),
}


def main() -> None:
    options = parsed()
    names = [name for name in FAULTS if name in options.only or name == "none"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = make(folder / "model", "llama")
        starts = start_seconds(model, folder) if len(names) == len(FAULTS) else {}
        outcomes = measure(names, model, folder, options)
    report = {
        "machine": machine(),
        **provenance(),
        "pace_s": options.pace_s,
        "lasts_s": options.lasts_s,
        "start_s": {kind: spread(took_s) for kind, took_s in starts.items()},
        "figures": [dataclasses.asdict(outcome) for outcome in outcomes],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    options.out.with_suffix(".svg").write_text(picture(chart(outcomes)))
    for line in (*table(outcomes), "", *start_table(starts)):
        print(line)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.outages", description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, help="where the figures go, as JSON; beside it an SVG"
    )
    parser.add_argument("--only", help=f"some of {','.join(FAULTS)}; `none` is always among them")
    parser.add_argument("--pace-s", type=float, default=1.0, help="from one request to the next")
    parser.add_argument("--lasts-s", type=float, default=30.0, help="how long a fault lasts")
    parser.add_argument("--log", type=Path, help="where a copy of vLLM's log goes")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    options = parser.parse_args()
    options.only = options.only.split(",") if options.only else list(FAULTS)
    if unknown := [name for name in options.only if name not in FAULTS]:
        parser.error(f"unknown fault {unknown[0]!r}")
    return options


def start_seconds(model: Path, folder: Path) -> dict[str, list[float]]:
    """Of `vllm serve`, from exec to its first 200, in turn."""
    kinds: dict[str, dict[str, object] | None] = {
        "without the connector": None,
        "with it, and no server there": {"dir": str(folder / "nobody")},
    }
    took_s: dict[str, list[float]] = {kind: [] for kind in kinds}
    for number in range(STARTS):
        for kind, connector in kinds.items():
            stubs = folder / f"stubs {number} {kind}"
            began_s = time.monotonic()
            with Serving(folder / "start.log", stubs, model, connector):
                took_s[kind].append(time.monotonic() - began_s)
                say(f"start {kind}", began_s)
    return took_s


def measure(names: list[str], model: Path, folder: Path, options: argparse.Namespace) -> list[Outcome]:
    with rig(model, folder, {}, pace_s=options.pace_s, lasts_s=options.lasts_s, seed=options.seed) as running:
        for name in names:
            began_s = time.monotonic()
            running.run(FAULTS[name])
            say(name, began_s)
    if options.log:
        shutil.copy(folder / "serve.log", options.log)
    engine = Engine(folder / "plain.log", model=str(model), enable_prefix_caching=False)
    try:
        return running.outcomes(Plain(engine))
    finally:
        engine.close()


def say(what: str, began_s: float) -> None:
    print(f"{what}: {time.monotonic() - began_s:.0f} s", file=sys.stderr, flush=True)


def table(outcomes: list[Outcome]) -> list[str]:
    with_peer = (*HEAD, "LMCache 0.5.6: worst")
    return markdown([with_peer, *((*row(outcome), peer_of(outcome)) for outcome in outcomes)])


def start_table(starts: dict[str, list[float]]) -> list[str]:
    rows = [
        (kind, f"{statistics.median(took_s):.1f} s ({min(took_s):.1f}..{max(took_s):.1f})")
        for kind, took_s in starts.items()
    ]
    return markdown([("`vllm serve`", "exec to the first 200"), *rows]) if rows else []


def markdown(rows: list[tuple[str, ...]]) -> list[str]:
    head, *others = (f"| {' | '.join(row)} |" for row in rows)
    return [head, "| --- " * len(rows[0]) + "|", *others]


def row(outcome: Outcome) -> tuple[str, ...]:
    again_s = outcome.hits_again_s
    counts = (outcome.requests, outcome.hits, outcome.failed, outcome.wrong, outcome.stuck, outcome.over_1_s)
    return (
        outcome.fault,
        *map(str, counts),
        f"{outcome.worst_ms:.0f} ms",
        f"{outcome.worst_added_ms:.0f} ms",
        "never" if again_s is None else f"{again_s:.1f} s",
    )


def peer_of(outcome: Outcome) -> str:
    return PEER[outcome.fault].says if outcome.fault in PEER else ""


def chart(outcomes: list[Outcome]) -> Chart:
    groups: dict[str, tuple[Bar, Bar | None]] = {}
    for outcome in outcomes:
        took_ms = [took_ms for _, _, took_ms in outcome.each]
        ours = Bar(max(took_ms), statistics.median(took_ms), max(took_ms))
        theirs = PEER[outcome.fault].worst_s if outcome.fault in PEER else None
        worst = Bar(1_000 * theirs[1], 1_000 * theirs[0], 1_000 * theirs[1]) if theirs else None
        groups[outcome.fault] = (ours, worst)
    return Chart(
        "The worst request while the cache server fails",
        "ms",
        ("lmconnector", "LMCache 0.5.6, where measured"),
        groups,
        logarithmic=True,
        note="The thin line: down to the median request here, to the best of several runs there.",
    )


if __name__ == "__main__":
    main()
