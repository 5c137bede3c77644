"""How long a start takes, cold and after kill -9, and how much memory the server holds."""

import socket
import subprocess
import sys
import time
import urllib.request

from bench.chunks import BUSY_RETRY_S, CHUNK_BYTES, Filler
from bench.kit import ROOT, Server, Workplace, clean_environment, memory, spread, workplace
from cache_server.client import RefusedError
from cache_server.protocol.messages import Code
from cache_server.session import Session

ANY_PORT = "127.0.0.1:0"
CONTROLS = {"python": "pass", "python_with_imports": "import zmq, msgpack, msgspec"}
SETTLE_S = 1.5  # the HTTP thread imports, a snapshot is taken


def measure(*, quick: bool) -> dict:
    capacity = "1GiB" if quick else "8GiB"
    chunks = (10_000,) if quick else (10_000, 100_000)
    return {
        "capacity": capacity,
        "cold": _cold(capacity, rounds=3 if quick else 9),
        "warm": {str(count): _warm(capacity, count, rounds=3 if quick else 7) for count in chunks},
        "idle": _idle(capacity),
    }


def _cold(capacity: str, rounds: int) -> dict:
    """The server's start, a Python that does nothing and one that imports what the server needs, in turn."""
    times: dict[str, list[float]] = {"first_pong_ms": [], "first_reserve_ms": []}
    for name in CONTROLS:
        times[f"{name}_ms"] = []
    for turn in range(rounds + 1):  # the first one compiles modules and fills the page cache
        taken: dict[str, float] = {}
        for name, code in CONTROLS.items():
            taken[f"{name}_ms"] = _run_ms(code)
        with workplace() as place:
            server = Server(place, "cold", capacity, ANY_PORT)
            taken["first_pong_ms"] = 1_000 * server.pong_s
            taken["first_reserve_ms"] = _first_reserve_ms(server)
            server.kill()
        if turn:
            for name, value in taken.items():
                times[name].append(value)
    return {name: spread(values) for name, values in times.items()}


def _run_ms(code: str) -> float:
    began_s = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean_environment(), check=True, timeout=60)
    return 1_000 * (time.perf_counter() - began_s)


def _first_reserve_ms(server: Server) -> float:
    """From exec; refused while no slab of the arena's memory has been populated."""
    session = Session(server.runtime_dir, "bench", CHUNK_BYTES)
    while True:
        try:
            session.reserve(1)
        except RefusedError as refusal:
            if refusal.code != Code.BUSY:
                raise
        else:
            session.abandon()
            return 1_000 * (time.perf_counter() - server.began_s)
        time.sleep(BUSY_RETRY_S)


def _warm(capacity: str, chunks: int, rounds: int) -> dict:
    """Starts on the arena that a killed server has left, beside a Python with the same imports."""
    pongs_ms: list[float] = []
    controls_ms: list[float] = []
    with workplace() as place:
        server = Server(place, "warm", capacity, ANY_PORT)
        empty = memory(server.pid)
        filler = Filler(server.runtime_dir)
        filler.fill(chunks)
        server.wait_populated()
        filled = memory(server.pid)
        filler.session.abandon()
        for _ in range(rounds):
            server.kill()
            controls_ms.append(_run_ms(CONTROLS["python_with_imports"]))
            server = Server(place, "warm", capacity, ANY_PORT)
            pongs_ms.append(1_000 * server.pong_s)
            restored = server.status()["chunks"]["restored"]
            assert restored == filler.chunks, f"{restored} of {filler.chunks} chunks were restored"
        restarted = _settled(server)
        server.kill()
    return {
        "chunks": filler.chunks,
        "first_pong_ms": spread(pongs_ms),
        "python_with_imports_ms": spread(controls_ms),
        "memory_before": empty,
        "memory_filled": filled,
        "memory_restarted": restarted,
    }


def _idle(capacity: str) -> dict:
    with workplace() as place:
        server = Server(place, "idle", capacity, ANY_PORT)
        idle = _settled(server)
        server.kill()
        server = _with_known_port(place, capacity)
        time.sleep(SETTLE_S)
        scraped = memory(server.pid)
        server.kill()
    return {"memory": idle, "memory_after_scrape": scraped}


def _with_known_port(place: Workplace, capacity: str) -> Server:
    """A server whose /metrics has been read once."""
    port = _free_port()
    server = Server(place, "scraped", capacity, f"127.0.0.1:{port}")
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        assert answer.status == 200, answer.status
        answer.read()
    return server


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def _settled(server: Server) -> dict[str, float]:
    time.sleep(SETTLE_S)
    return memory(server.pid)


def summary(figures: dict) -> list[tuple[str, str]]:
    cold, idle = figures["cold"], figures["idle"]
    lines = [
        (f"start to first PONG, {figures['capacity']}", _ms(cold["first_pong_ms"])),
        ("  beside: python -c pass", _ms(cold["python_ms"])),
        ("  beside: with zmq, msgpack, msgspec", _ms(cold["python_with_imports_ms"])),
        ("start to first RESERVE", _ms(cold["first_reserve_ms"])),
        ("memory, idle", f"{idle['memory']['own_mib']} MiB + {idle['memory']['arena_mib']} of tables"),
        ("memory, after a scrape", f"{idle['memory_after_scrape']['own_mib']} MiB"),
    ]
    for warm in figures["warm"].values():
        filled, again = warm["memory_filled"], warm["memory_restarted"]
        lines += [
            (f"restart with {warm['chunks']} chunks", _ms(warm["first_pong_ms"])),
            ("  memory before the restart", f"{filled['own_mib']} MiB + {filled['arena_mib']} of tables"),
            ("  memory after it", f"{again['own_mib']} MiB + {again['arena_mib']} of tables"),
        ]
    return lines


def _ms(value: dict[str, float]) -> str:
    return f"{value['median']:.0f} ms ({value['least']:.0f}..{value['most']:.0f})"
