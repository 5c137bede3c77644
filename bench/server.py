"""The cache server's figures: `python -m bench.server --out FILE.json [--quick] [--only start,latency,…]`."""

import argparse
import json
import sys
import time
from pathlib import Path

from bench import server_growth, server_latency, server_load, server_start, server_workers
from bench.kit import bounded, machine, provenance
from bench.picture import Chart, bar_of, picture

PARTS = {
    "start": server_start,
    "latency": server_latency,
    "load": server_load,
    "workers": server_workers,
    "growth": server_growth,
}
PART_DEADLINE_S = 900


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.server", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="few rounds and small sizes: a test of the bench"
    )
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"unknown part {unknown[0]!r}")
    report: dict = {"machine": machine(), **provenance(), "quick": options.quick, "figures": {}}
    for name in chosen:
        began_s = time.perf_counter()
        with bounded(PART_DEADLINE_S):
            figures = PARTS[name].measure(quick=options.quick)
        report["figures"][name] = {**figures, "took_s": round(time.perf_counter() - began_s, 1)}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\n{name}", file=sys.stderr)
        for what, value in PARTS[name].summary(figures):
            print(f"  {what:36} {value}", file=sys.stderr)
    if latency := report["figures"].get("latency"):
        options.out.with_suffix(".svg").write_text(picture(chart(latency, report)))


def chart(latency: dict, report: dict) -> Chart:
    kinds = [name for name in latency if isinstance(latency[name], dict)]
    groups = {name.replace("_", " "): [bar_of(latency[name]["ratio_p50"])] for name in kinds}
    note = f"{report['machine']['cpu']}, commit {report['commit'][:7]}; PING: at most 1.5, LOOKUP: at most 2"
    return Chart("Round trips, as a multiple of a bare echo's", "x", ["ratio"], groups, note=note)


if __name__ == "__main__":
    main()
