"""How fast the health pages answer: the server idle, under full load, its main loop stuck; many at once."""

import argparse
import json
import multiprocessing
import socket
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

from bench.health_probes import answered, trip, within_5_ms
from bench.kit import Server, machine, percentile, provenance, workplace
from cache_server.client import RefusedError
from cache_server.faults import SWITCH
from cache_server.session import Session, StaleError

PAGES = ("/live", "/ready", "/startup", "/health", "/health/events", "/metrics")
PART_BYTES = 4096
PROBERS = 200
LOADERS = 2


def measured(port: int, count: int) -> dict:
    figures: dict = {}
    before = counted(port)
    for page in PAGES:
        taken: list[float] = []
        trip(port, page)
        for _ in range(count):
            began_s = time.perf_counter()
            trip(port, page)
            taken.append((time.perf_counter() - began_s) * 1_000)
            time.sleep(0.002)
        figures[page] = {f"p{each}_ms": round(percentile(taken, each), 2) for each in (50, 99)}
    return figures | {"within 5 ms, by the server's clock": within_5_ms(counted(port) - before)}


def counted(port: int) -> Counter[tuple[str, str]]:
    return answered(trip(port, "/metrics").decode())


def load(runtime_dir: Path, number: int) -> None:
    session = Session(runtime_dir, f"load-{number}", PART_BYTES)
    turn = 0
    while True:
        turn += 1
        hashes = [sha256(f"{number} {turn} {at}".encode()).digest() for at in range(64)]
        try:
            session.store(hashes, [b"x"] * 64)
            session.load(hashes)
        except (RefusedError, StaleError):
            pass


def crowd(port: int) -> dict[str, float]:
    """All connect, then all ask at once; the time until the last has its answer."""
    clients = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(PROBERS)]
    time.sleep(0.2)
    began_s = time.perf_counter()
    for client in clients:
        client.sendall(b"GET /live HTTP/1.1\r\n\r\n")
    answers = [client.recv(1 << 16) for client in clients]
    took_ms = (time.perf_counter() - began_s) * 1_000
    for client in clients:
        client.close()
    return {
        "answered": sum(answer.startswith(b"HTTP/1.1 ") for answer in answers),
        "all_ms": round(took_ms, 1),
    }


def run(count: int) -> dict:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with workplace() as place:
        place.environment = {SWITCH: "1"}
        server = Server(place, "latency", "256MiB", f"127.0.0.1:{port}")
        server.wait_populated()
        figures: dict = {"idle": measured(port, count), "crowd of 200": crowd(port)}
        loaders = [
            multiprocessing.Process(target=load, args=(server.runtime_dir, each)) for each in range(LOADERS)
        ]
        for each in loaders:
            each.start()
        time.sleep(1)
        figures["full load"] = measured(port, count)
        for each in loaders:
            each.kill()
            each.join()
        (server.runtime_dir / ".loop").write_text("60")
        (server.runtime_dir / ".loop").rename(server.runtime_dir / "fault.loop")
        time.sleep(1)
        figures["loop stuck"] = measured(port, count)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--count", type=int, default=1_000, help="questions for each page")
    parser.add_argument("--out", type=Path, help="where the figures go too, as JSON")
    options = parser.parse_args()
    text = json.dumps({"machine": machine(), "provenance": provenance(), **run(options.count)}, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
