"""How long an engine is without its cache: `python -m bench.recovery --out FILE.json [--quick] [--only …]`.

Parts: `outage`, the connector's real heartbeat, as it comes by default, against real servers that are killed,
started again, and stopped; `start`, what the connector adds to the start of a real vLLM.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from bench.engines import Engine, Variant, ours
from bench.kit import Server, Workplace, bounded, clean_environment, machine, provenance, spread, workplace
from bench.picture import Chart, bar_of, picture
from cache_server.protocol import messages as m
from lmconnector.config import Options
from lmconnector.membership import Member, registration

PART_BYTES = 1 << 20
CAPACITY = "256MiB"
LOOK_S = 0.0005
WAIT_S = 60.0
RESTART_AFTER_S = (0.0, 0.5, 2.0)
DEADLINE_S = 1_800
PARTS = ("outage", "start")


class Outages:
    """Each round has a server and a member of its own: an earlier outage says nothing of a later one."""

    def __init__(self) -> None:
        self.times_ms: dict[str, list[float]] = defaultdict(list)

    def take(self, what: str, holds: Callable[[], bool], began_s: float) -> None:
        self.times_ms[what].append(1_000 * (wait_until(holds) - began_s))

    def killed(self, place: Workplace, name: str, down_s: float) -> None:
        server, member = known(place, name)
        began_s = time.perf_counter()
        server.kill()
        self.take("kill -9 -> gate shut", lambda: not member.usable, began_s)
        time.sleep(down_s)
        server = Server(place, name, CAPACITY)
        began_s = server.began_s + server.pong_s
        self.take(f"back after {down_s:g} s: first PONG -> gate open", lambda: member.usable, began_s)
        end(server, member)

    def stopped(self, place: Workplace, name: str, phase_s: float) -> None:
        """`phase_s` after it has become known: somewhere between two pings."""
        server, member = known(place, name)
        time.sleep(phase_s)
        began_s = time.perf_counter()
        os.kill(server.pid, signal.SIGSTOP)
        self.take("SIGSTOP -> gate shut", lambda: not member.usable, began_s)
        began_s = time.perf_counter()
        os.kill(server.pid, signal.SIGCONT)
        self.take("SIGCONT -> gate open", lambda: member.usable, began_s)
        end(server, member)


def known(place: Workplace, name: str) -> tuple[Server, Member]:
    server = Server(place, name, CAPACITY)
    options = Options(dir=str(server.runtime_dir))
    layout = m.Layout(groups=(m.Group(PART_BYTES, 0),))
    member = Member(options, registration(f"recovery-{name}", 0, 1, b"bench", layout))
    member.heartbeat.ensure_started()
    wait_until(lambda: member.usable)
    return server, member


def end(server: Server, member: Member) -> None:
    member.close()
    server.kill()


def wait_until(holds: Callable[[], bool]) -> float:
    """-> when it was seen, to half a millisecond"""
    end_s = time.perf_counter() + WAIT_S
    while not holds():
        if time.perf_counter() > end_s:
            raise TimeoutError("the gate did not move in time")
        time.sleep(LOOK_S)
    return time.perf_counter()


def outage(*, quick: bool) -> dict:
    outages, timing = Outages(), Options().timing
    rounds = 2 if quick else 15
    with workplace() as place:
        for number in range(rounds):
            for down_s in RESTART_AFTER_S:
                outages.killed(place, f"killed-{number}-{down_s:g}", down_s)
            phase_s = timing.interval_ms / 1_000 * (1 + number / rounds)
            outages.stopped(place, f"stopped-{number}", phase_s)
    return {
        "interval_ms": timing.interval_ms,
        "hang_found_within_ms": timing.hang_found_within_ms,
        "times_ms": {what: spread(values) for what, values in outages.times_ms.items()},
    }


def start(*, quick: bool) -> dict:
    """From exec until vLLM can be asked, in turn."""
    times_s: dict[str, list[float]] = defaultdict(list)
    with workplace() as place:
        model = place.path / "model"
        command = [sys.executable, "-m", "lmconnector.demo.model", str(model), "llama"]
        subprocess.run(command, env=clean_environment(), check=True, timeout=300, stdout=subprocess.DEVNULL)
        server = Server(place, "server", "1GiB")
        nobody = place.path / "nobody"
        variants = {
            "without a connector": Variant("none"),
            "with it": ours(server.runtime_dir),
            "with it, no server": ours(nobody),
        }
        for number in range((1 if quick else 7) + 1):  # the first reads everything from the disk
            for name, variant in variants.items():
                began_s = time.perf_counter()
                engine = Engine(variant, model, place.path / "vllm.log").started()
                if number:
                    times_s[name].append(time.perf_counter() - began_s)
                engine.close()
        server.kill()
    plain = times_s["without a connector"]
    return {
        "times_s": {name: spread(values, 2) for name, values in times_s.items()},
        "added_s": {
            name: spread([one - other for one, other in zip(values, plain, strict=True)], 2)
            for name, values in times_s.items()
            if values is not plain
        },
    }


def told(figures: dict) -> None:
    for part, key, unit in (
        ("outage", "times_ms", "ms"),
        ("start", "times_s", "s"),
        ("start", "added_s", "s"),
    ):
        for what, value in figures.get(part, {}).get(key, {}).items():
            added = "added, " if key == "added_s" else ""
            print(
                f"{added + what:44} {value['median']:8} ({value['least']}..{value['most']}) {unit}",
                file=sys.stderr,
            )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.recovery", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, as JSON, and an SVG")
    parser.add_argument("--quick", action="store_true", help="few rounds: a test of the bench")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    options = parser.parse_args()
    report: dict = {"machine": machine(), **provenance(), "quick": options.quick, "figures": {}}
    parts = {"outage": outage, "start": start}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        with bounded(DEADLINE_S):
            report["figures"][name] = parts[name](quick=options.quick)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    told(report["figures"])
    if "outage" in report["figures"]:
        times = report["figures"]["outage"]["times_ms"]
        groups = {what: [bar_of(value)] for what, value in times.items()}
        note = f"{report['machine']['cpu']}, commit {report['commit'][:7]}"
        chart = Chart("An outage, seen from the engine", "ms", ["time"], groups, logarithmic=True, note=note)
        options.out.with_suffix(".svg").write_text(picture(chart))


if __name__ == "__main__":
    main()
