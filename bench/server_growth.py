"""Whether a LOOKUP or COMMIT costs more the more chunks are stored, and what a chunk costs in memory."""

import random
import statistics
import time

from bench.chunks import CHUNK_BYTES, Filler
from bench.kit import GIB, Server, Wire, cpu_ns, echo_request, latency_us, memory, workplace
from cache_server.protocol import messages as m
from cache_server.protocol.codec import encode
from cache_server.protocol.keys import pack_slot_names

COMMIT_CHUNKS = 16
KINDS = ("lookup_same", "lookup_any", "commit", "echo")
GROWTH_MAX = 0.2  # by the COMMITs that are timed; then it is filled anew


def measure(*, quick: bool) -> dict:
    sizes = (1_000, 10_000, 100_000) if quick else (1_000, 10_000, 100_000, 1_000_000)
    rounds, trips = (3, 20) if quick else (15, 100)
    capacity_gib = -(-sizes[-1] * CHUNK_BYTES * 5 // 4 // GIB)
    steps: list[dict] = []
    with workplace() as place:
        server = Server(place, "growth", f"{capacity_gib}GiB")
        echo = place.echo()
        filler = Filler(server.runtime_dir)
        server.wait_populated()
        empty = memory(server.pid)
        for size in sizes:
            stored_before, began_s = filler.chunks, time.perf_counter()
            filler.fill(size)
            filled_s = time.perf_counter() - began_s
            steps.append(
                {
                    "chunks": filler.chunks,
                    "stored_per_s": round((filler.chunks - stored_before) / filled_s),
                    **_costs(server, echo, filler, rounds, trips),
                    "chunks_after": server.status()["chunks"]["stored"],
                    "memory": memory(server.pid),
                }
            )
        echo.close()
        filler.session.abandon()
        server.kill()
    grown_mib = steps[-1]["memory"]["own_mib"] - empty["own_mib"]
    return {
        "steps": steps,
        "flatness": {name: _flatness(steps, name) for name in KINDS},
        "memory_empty": empty,
        "bytes_per_chunk": round(grown_mib * (1 << 20) / steps[-1]["chunks_after"]),
    }


def _costs(server: Server, echo: Wire, filler: Filler, rounds: int, trips: int) -> dict:
    """Each kind of request and the echo in turn, round by round; the first round is thrown away."""
    size, committed = filler.chunks, 0
    chosen = random.Random(size)
    times: dict[str, list[list[int]]] = {name: [] for name in KINDS}
    cpu_us: dict[str, list[float]] = {name: [] for name in KINDS}
    for _ in range(rounds + 1):
        if committed > GROWTH_MAX * size:
            filler.clear()
            filler.fill(size)
            committed = 0
        same = encode(filler.lookup(filler.prompts[0]))
        reply_bytes = len(server.wire.trip(same))
        batches = {
            "lookup_same": [same] * trips,
            "lookup_any": [encode(filler.lookup(chosen.choice(filler.prompts))) for _ in range(trips)],
            "commit": _commits(filler, trips // 2),
            "echo": [echo_request(len(same), reply_bytes)] * trips,
        }
        committed += len(batches["commit"]) * COMMIT_CHUNKS
        for name, requests in batches.items():
            wire = echo if name == "echo" else server.wire
            before_ns = cpu_ns(server.pid)["main"]
            times[name].append([wire.trips_ns(request, 1)[0] for request in requests])
            cpu_us[name].append((cpu_ns(server.pid)["main"] - before_ns) / 1_000 / len(requests))
    return {
        name: {**latency_us(times[name][1:]), "server_cpu_us": round(statistics.median(cpu_us[name][1:]), 1)}
        for name in KINDS
    }


def _commits(filler: Filler, count: int) -> list[bytes]:
    """Requests that each commit 16 new chunks."""
    slots = [filler.reserve(COMMIT_CHUNKS) for _ in range(count)]
    return [
        encode(
            m.Commit(
                id=1,
                session=filler.session.session,
                hashes=filler.new_hashes(COMMIT_CHUNKS),
                slots=pack_slot_names(reserved),
            )
        )
        for reserved in slots
    ]


def _flatness(steps: list[dict], name: str) -> dict[str, float]:
    """The last step's cost over the first's, of the round trip and of the server's CPU time alone."""
    first, last = steps[0][name], steps[-1][name]
    flatness = {"p50": round(last["p50"] / first["p50"], 2)}
    if name != "echo":
        flatness["server_cpu"] = round(last["server_cpu_us"] / first["server_cpu_us"], 2)
    return flatness


def summary(figures: dict) -> list[tuple[str, str]]:
    lines = [
        (
            f"{step['chunks']} chunks",
            ", ".join(f"{name} {step[name]['p50']} us (cpu {step[name]['server_cpu_us']})" for name in KINDS)
            + f"; {step['memory']['own_mib']:.0f} MiB; filled at {step['stored_per_s']}/s",
        )
        for step in figures["steps"]
    ]
    lines += [
        (f"flatness of {name}", ", ".join(f"{what} {value}" for what, value in flat.items()))
        for name, flat in figures["flatness"].items()
    ]
    lines.append(("memory per chunk", f"{figures['bytes_per_chunk']} bytes"))
    return lines
