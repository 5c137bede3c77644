"""What each health endpoint says when something happens to a real server, when, and the documented bound.

    python -m bench.health_events --out out/health_events.json

The server has its default options, but for a small arena.  An endpoint that says too late what it should, or
at any time what it should not, breaks the run: exit code 1.
"""

import argparse
import json
import math
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.health_experiments import BEGIN, END, EXPERIMENTS, Bound, Experiment, Rig
from bench.health_probes import ANSWER_WITHIN_S, FINE, Change, Log, asking
from bench.kit import Server, machine, percentile, provenance, workplace
from cache_server.config import gather, parse
from cache_server.faults import SWITCH

CAPACITY = "64MiB"
NOTING_MS = 20  # a moment is noted by a thread of ours, that has to be given the time for it
HEAD = ("event", "endpoint", "said", "after", "bound")


@dataclass
class Row:
    """One change of what an endpoint says, and between which two times after the moment; without any: it says
    the same throughout."""

    event: str
    endpoint: str
    said: str
    since: str = ""
    after_ms: tuple[int, int] | None = None
    within_ms: float | None = None


@dataclass
class Seen:
    """What came of one experiment."""

    rows: list[Row]
    complaints: list[str]
    answers_ms: dict[str, dict[str, float]]
    notes: dict[str, object]


def run(experiment: Experiment) -> Seen:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with workplace() as place:
        place.environment = {SWITCH: "1"}
        with experiment.prepared(place):
            server = Server(place, experiment.directory, CAPACITY, f"127.0.0.1:{port}")
            flags = {"dir": str(server.runtime_dir), "capacity": CAPACITY}
            config = parse(gather(flags, {}, None))
            with asking(config, port) as probes:
                if experiment.well_before:
                    probes.wait_fine()
                rig = Rig(place, server, port, config, probes)
                experiment.act(rig)
            server.kill()
    bounds = experiment.bounds(config)
    return Seen(
        [row for name, log in probes.logs.items() for row in rows(experiment.name, name, log, rig, bounds)],
        [
            each
            for name, log in probes.logs.items()
            for each in complaints(experiment, name, log, rig, bounds)
        ],
        {name: times(log) for name, log in probes.logs.items()},
        rig.notes,
    )


def rows(event: str, endpoint: str, log: Log, rig: Rig, bounds: Sequence[Bound]) -> list[Row]:
    changes = log.changes(rig.moments[BEGIN])
    if not changes:
        return [Row(event, endpoint, log.since(rig.moments[BEGIN])[0].said)]
    found: list[Row] = []
    for change in changes:
        since = END if rig.moments.get(END, math.inf) <= change.most_s else BEGIN
        bound = bound_of(Bound(endpoint, change.said, None, since), bounds)
        within_ms = bound.within_ms if bound else None
        found.append(Row(event, endpoint, change.said, since, after(change, rig.moments[since]), within_ms))
    return found


def bound_of(change: Bound, bounds: Sequence[Bound]) -> Bound | None:
    return next((each for each in bounds if each._replace(within_ms=None) == change), None)


def after(change: Change, moment_s: float) -> tuple[int, int]:
    return (
        round((max(change.least_s, moment_s) - moment_s) * 1_000),
        round((change.most_s - moment_s) * 1_000),
    )


def complaints(
    experiment: Experiment, endpoint: str, log: Log, rig: Rig, bounds: Sequence[Bound]
) -> list[str]:
    own = [bound for bound in bounds if bound.endpoint == endpoint]
    allowed = {FINE[endpoint], *experiment.also, *(bound.said for bound in own)}
    said = {answer.said for answer in log.since(rig.moments[BEGIN])}
    found = [f"{experiment.name}: {endpoint} said {each!r}" for each in sorted(said - allowed)]
    for bound in own:
        moment_s = rig.moments[bound.since]
        changes = [each for each in log.changes(moment_s) if each.said == bound.said]
        what = f"{experiment.name}: {endpoint} said {bound.said!r}"
        if not changes:
            found.append(f"{what} never after the {bound.since}")
        elif bound.within_ms is not None:
            least_ms, _ = after(changes[0], moment_s)
            if least_ms > bound.within_ms + NOTING_MS:
                found.append(f"{what} {least_ms} ms after the {bound.since}, not {bound.within_ms:.0f}")
    return found


def times(log: Log) -> dict[str, float]:
    """Of the answers that there were."""
    taken = [(each.got_s - each.asked_s) * 1_000 for each in log.answers]
    taken = [each for each in taken if each < ANSWER_WITHIN_S * 1_000] or [0.0]
    figures = {f"p{percent}": round(percentile(taken, percent), 2) for percent in (50, 99)}
    return {"count": len(log.answers), **figures, "most": round(max(taken), 2)}


def table(found: Sequence[Row]) -> list[str]:
    """In order of time; what several endpoints say to the same is one line.  `--deep` is asked less often."""
    alike: dict[tuple[object, ...], list[Row]] = {}
    events = list(dict.fromkeys(row.event for row in found))
    for row in sorted(found, key=lambda row: (events.index(row.event), row.since, row.after_ms or (0, 0))):
        kind = (row.endpoint == "check --deep", row.after_ms is not None)
        alike.setdefault((row.event, row.said, row.since, row.within_ms, *kind), []).append(row)
    lines = [HEAD, *map(cells, alike.values())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return [f"| {' | '.join(line)} |" for line in padded]


def cells(alike: Sequence[Row]) -> tuple[str, ...]:
    row, endpoints = alike[0], ", ".join(dict.fromkeys(each.endpoint for each in alike))
    if row.after_ms is None:
        return (row.event, endpoints, row.said, "throughout", "")
    ends = [each.after_ms for each in alike if each.after_ms is not None]
    least_s, most_s = min(least for least, _ in ends) / 1_000, max(most for _, most in ends) / 1_000
    when = f"{least_s:.2f}..{most_s:.2f} s" + (" after its end" if row.since == END else "")
    bound = "" if row.within_ms is None else f"{row.within_ms / 1_000:g} s"
    return (row.event, endpoints, row.said, when, bound)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.health_events", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON")
    names = [each.__name__ for each in EXPERIMENTS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="some of the experiments")
    options = parser.parse_args()
    report: dict = {"machine": machine(), **provenance(), "events": {}}
    broken: list[str] = []
    found: list[Row] = []
    for kind in EXPERIMENTS:
        if kind.__name__ in options.only:
            seen = run(kind())
            report["events"][kind.name] = asdict(seen)
            broken += seen.complaints
            found += seen.rows
            print(f"{kind.name}: {seen.complaints or 'as documented'}", file=sys.stderr)
    print("\n".join([*table(found), "", *broken]))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
