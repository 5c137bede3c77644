"""A recorded trace against a real server: `python -m bench.replay --trace FILE --out FILE.json [--quick]`.

A line of the trace is one request: {"timestamp": ms, "hash_ids": [..]}; equal ids are equal chunks after
equal prefixes.  Chunks have 4 KiB here and nobody writes them, for the server never reads them.
Parts: `policies`, hit rates by policy and capacity, beside the index alone; `growth`, the trace with 1 to 100
times the users; `realtime`, in proportion to its clock, with thousands of sessions and leases at once.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.chunks import CHUNK_BYTES
from bench.eviction_trace import Prompt, replay, to_blocks
from bench.kit import (
    Server,
    Wire,
    Workplace,
    bounded,
    cpu_ns,
    cpu_spent,
    machine,
    memory,
    percentile,
    provenance,
    workplace,
)
from bench.picture import Bar, Chart, picture
from bench.replay_flow import Arrival, Player, scaled
from cache_server.eviction import POLICIES
from cache_server.session import Session

PERCENT_OF_CHUNKS = (5, 10, 50)
CAPACITY_BYTES_MIN = 16 << 20  # the server's
GROWTH_PERCENT = 10
ENGINES = 16
SESSIONS = 2_000  # registered at once in real-time proportion
WINDOW = 64
BATCH = 64  # chunks of one RESERVE
IDLE_S = 2.0
HELD_S = 20.0  # of the server's 30 s of a lease
DEADLINE_S = 3_600
PARTS = ("policies", "growth", "realtime")


class Trace(NamedTuple):
    prompts: Sequence[Prompt]
    timestamps_s: Sequence[float]

    @property
    def packed(self) -> list[bytes]:
        return [b"".join(prompt) for prompt in self.prompts]

    @property
    def distinct(self) -> int:
        return len({chunk for prompt in self.prompts for chunk in prompt})


def load(path: Path, requests: int | None) -> Trace:
    with path.open() as lines:
        rows = [json.loads(line) for line in lines if line.strip()][:requests]
    return Trace([to_blocks(row["hash_ids"]) for row in rows], [row["timestamp"] / 1_000 for row in rows])


class Replayed:
    """A server of that many slots, its engines, and a player."""

    def __init__(self, place: Workplace, name: str, slots: int, policy: str, engines: int) -> None:
        place.environment = {"CACHE_SERVER_POLICY": policy, "CACHE_SERVER_CANARY_IDLE": "off"}
        self.server = Server(place, name, f"{max(CAPACITY_BYTES_MIN, slots * CHUNK_BYTES)}B")
        self.server.wait_populated()
        arena = self.server.status()["arena"]
        self.slots = arena["capacity_bytes"] // CHUNK_BYTES
        self.sessions = [
            Session(self.server.runtime_dir, f"replay-{number}", CHUNK_BYTES) for number in range(engines)
        ]
        for session in self.sessions:
            session.client.close()  # its registration stays, and all go by one socket
        spent: dict[str, float] = {}
        with cpu_spent(self.server.pid, spent):
            time.sleep(IDLE_S)
        self.idle_percent = spent["main_percent"]  # it looks at each session's lock, used or not
        self.empty_mib = memory(self.server.pid)["anonymous_mib"]
        ids = [session.session for session in self.sessions]
        self.player = Player(Wire(self.server.socket_path), ids, BATCH, self.slots)

    def play(self, arrivals: Callable[[], object], window: int) -> dict:
        before_ns = cpu_ns(self.server.pid)["main"]
        took_s = self.player.play(arrivals(), window)
        used_us = (cpu_ns(self.server.pid)["main"] - before_ns) / 1_000
        books, status = self.player.books, self.server.status()
        stored = status["chunks"]["stored"]
        held_mib = memory(self.server.pid)["anonymous_mib"] - self.empty_mib
        return {
            "slots": self.slots,
            "requests": books["requests"],
            "hit_percent": round(100 * books["found"] / books["asked"], 2),
            "took_s": round(took_s, 1),
            "ops_per_s": round(books["ops"] / took_s),
            "cpu_us_per_op": round((used_us - 1e4 * self.idle_percent * took_s) / books["ops"], 1),
            "idle_percent_of_a_core": self.idle_percent,
            "chunks": stored,
            "held_mib": round(held_mib, 1),
            "bytes_per_chunk": round(held_mib * (1 << 20) / max(1, stored)),
            "leases_most": self.player.leases_most,
            "late_ms": {
                f"p{each}": round(1_000 * percentile(self.player.late_s, each), 1) for each in (50, 99)
            },
            "counted": {key: value for key, value in books.items() if " " in key or key == "orphans"},
        }

    def close(self) -> None:
        for session in self.sessions:
            session.abandon()
        self.server.kill()


def at_once(prompts: Sequence[bytes]) -> list[Arrival]:
    return [Arrival(0.0, prompt, 0.0) for prompt in prompts]


def policies(trace: Trace, options: argparse.Namespace) -> dict:
    """One request after the other, as the index alone is played; every server lives at the same time."""
    figures: dict = {}
    arrivals = at_once(trace.packed)
    for percent in options.percents:
        with workplace() as place:
            for policy in POLICIES:
                played = Replayed(place, policy, max(1, trace.distinct * percent // 100), policy, ENGINES)
                row = played.play(lambda: arrivals, 1)
                row["hit_percent_of_the_index"] = round(
                    100
                    * replay(trace.prompts, POLICIES[policy], played.slots)
                    / sum(map(len, trace.prompts)),
                    2,
                )
                played.close()
                figures[f"{policy}, {percent} %"] = row
                told(f"{policy}, {percent} %", row)
    return figures


def growth(trace: Trace, options: argparse.Namespace) -> dict:
    figures: dict = {}
    packed = trace.packed
    for copies in options.scales:
        slots = max(1, copies * trace.distinct * GROWTH_PERCENT // 100)
        with workplace() as place:
            played = Replayed(place, "growth", slots, "lrfu", ENGINES)
            row = played.play(
                lambda: (Arrival(0.0, prompt, 0.0) for prompt in scaled(packed, copies)),  # noqa: B023
                WINDOW,
            )
            played.close()
        figures[f"{copies}x"] = row
        told(f"{copies}x", row)
    return figures


def realtime(trace: Trace, options: argparse.Namespace) -> dict:
    """The trace's clock runs `speed` times as fast; every request keeps its lease for 20 s."""
    begin_s = trace.timestamps_s[0]
    arrivals = [
        Arrival((at_s - begin_s) / options.speed, prompt, HELD_S)
        for at_s, prompt in zip(trace.timestamps_s, trace.packed, strict=True)
        if (at_s - begin_s) / options.speed < options.seconds
    ]
    with workplace() as place:
        slots = max(1, trace.distinct * GROWTH_PERCENT // 100)
        played = Replayed(place, "realtime", slots, "lrfu", options.sessions)
        row = {"speed": options.speed, "sessions": options.sessions}
        row |= played.play(lambda: arrivals, 1 << 20)
        played.close()
    told(f"realtime, {options.speed:g} times as fast", row)
    return row


def told(name: str, row: dict) -> None:
    print(
        f"{name:28} hits {row['hit_percent']:5.2f} %  {row['ops_per_s']:6} ops/s  "
        f"{row['cpu_us_per_op']:6} us/op  {row['chunks']:8} chunks in {row['held_mib']:6} MiB  "
        f"{row['took_s']} s, leases {row['leases_most']}, late p99 {row['late_ms']['p99']} ms "
        f"{row['counted'] or ''}",
        file=sys.stderr,
        flush=True,
    )


def chart(figures: dict, note: str) -> Chart | None:
    rates = {
        name: [Bar(*[row["hit_percent"]] * 3), Bar(*[row["hit_percent_of_the_index"]] * 3)]
        for name, row in figures.get("policies", {}).items()
    }
    if not rates:
        return None
    return Chart(
        "Hit rate on the trace, by policy and capacity", "%", ["server", "index alone"], rates, note=note
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__)
    parser.add_argument("--trace", type=Path, required=True, help="JSON lines with timestamp and hash_ids")
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, as JSON, and an SVG")
    parser.add_argument("--quick", action="store_true", help="1,000 requests: a test of the bench")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--scales", default="1,3,10", help="times the users; 100 wants 12 GiB and 20 minutes")
    parser.add_argument(
        "--speed", type=float, default=30, help="of the trace's clock in real-time proportion"
    )
    parser.add_argument("--seconds", type=float, default=60, help="for so long it is played like that")
    options = parser.parse_args()
    options.scales = [int(scale) for scale in options.scales.split(",")]
    options.percents, options.sessions = PERCENT_OF_CHUNKS, SESSIONS
    if options.quick:
        options.percents, options.scales = (10,), [1, 2]
        options.sessions, options.seconds = 100, min(options.seconds, 3)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    trace = load(options.trace, 1_000 if options.quick else None)
    report: dict = {"machine": machine(), **provenance(), "quick": options.quick, "trace": options.trace.name}
    report |= {"requests": len(trace.prompts), "distinct_chunks": trace.distinct, "figures": {}}
    parts = {"policies": policies, "growth": growth, "realtime": realtime}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        began_s = time.perf_counter()
        with bounded(DEADLINE_S):
            report["figures"][name] = parts[name](trace, options)
        print(f"{name}: {time.perf_counter() - began_s:.0f} s\n", file=sys.stderr)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    note = f"{report['machine']['cpu']}, commit {report['commit'][:7]}, {options.trace.name}"
    if drawing := chart(report["figures"], note):
        options.out.with_suffix(".svg").write_text(picture(drawing))


if __name__ == "__main__":
    main()
