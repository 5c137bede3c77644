"""False alarms: mixed load, engines that come and die, and long legal work, under probes of every kind.

    python -m bench.health_soak --seconds 600

An alarm is /live that is not 200, /ready that is not 200 while the loop is not under a lease, or an exec
probe that fails.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

from bench.health_probes import answered, within_5_ms
from bench.kit import ROOT, Server, clean_environment, machine, percentile, provenance, workplace
from cache_server.client import RefusedError, UnreachableError
from cache_server.faults import SWITCH
from cache_server.session import Session, StaleError

ENGINES = 3
PART_BYTES = 64 << 10
CAPACITY = "128MiB"
LEASES_S = (15, 60)  # in turn; longer than `stall_after`
FIRST_LEASE_S, LEASE_EVERY_S = 10, 40
PAGES = ("/live", "/ready", "/startup", "/health", "/health/events", "/metrics", "/status")
CHECKS = ("--live", "--ready", "--deep")
LEASED_CODES = ("busy",)
AFTER_LEASE_S = 1.0  # the snapshot that ends it


class Soak:
    def __init__(self, server: Server, address: str, seconds: float) -> None:
        self.server = server
        self.address = address
        self.end_s = time.monotonic() + seconds
        self.alarms: list[str] = []
        self.taken_ms: dict[str, list[float]] = {page: [] for page in PAGES}
        self.done: Counter[str] = Counter()
        self.leased_until_s = 0.0

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.end_s

    def alarm(self, text: str) -> None:
        self.alarms.append(f"{time.monotonic() - self.end_s:+.1f} s: {text}")

    def get(self, page: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://{self.address}{page}", timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def probe(self, page: str, pause_s: float) -> None:
        while not self.over:
            began_s = time.perf_counter()
            code, body = self.get(page)
            self.taken_ms[page].append((time.perf_counter() - began_s) * 1_000)
            if code != 200 and not self._is_legal(page, body):
                self.alarm(f"{page} said {code}: {body.decode()[:300]}")
            time.sleep(pause_s)

    def _is_legal(self, page: str, body: bytes) -> bool:
        leased = time.monotonic() < self.leased_until_s + AFTER_LEASE_S
        return page in ("/ready", "/health") and leased and json.loads(body)["code"] in LEASED_CODES

    def exec_probe(self) -> None:
        while not self.over:
            leased = time.monotonic() < self.leased_until_s + AFTER_LEASE_S
            kind = "--live" if leased else random.choice(CHECKS)
            options = ["--dir", str(self.server.runtime_dir), "--capacity", CAPACITY]
            done = subprocess.run(
                [sys.executable, "-m", "cache_server", "check", kind, *options],
                cwd=ROOT,
                env=clean_environment(),
                capture_output=True,
                check=False,
            )
            self.done[f"check {kind}"] += 1
            leased = leased or time.monotonic() < self.leased_until_s
            if done.returncode and (kind == "--live" or not leased):
                self.alarm(f"check {kind}: {done.stderr.decode().strip()}")
            time.sleep(5)

    def lease(self) -> None:
        """Long, legal work of the loop, again and again."""
        pause_s = FIRST_LEASE_S
        for lease_s in itertools.cycle(LEASES_S):
            time.sleep(pause_s)
            if self.end_s - time.monotonic() < lease_s + 5:
                return
            self.leased_until_s = time.monotonic() + lease_s
            order = self.server.runtime_dir / ".loop"
            order.write_text(f"busy {lease_s}")
            order.rename(self.server.runtime_dir / "fault.loop")
            self.done[f"leases of {lease_s} s"] += 1
            time.sleep(lease_s)
            pause_s = LEASE_EVERY_S

    def engine(self, number: int) -> None:
        """Bursts of work, idle times, and now and then a death."""
        chance = random.Random(number)
        life = 0
        while not self.over:
            life += 1
            with contextlib.suppress(UnreachableError, RefusedError, OSError):
                self._live_once(chance, f"engine-{number}-{life}")

    def _live_once(self, chance: random.Random, name: str) -> None:
        session = Session(self.server.runtime_dir, name, PART_BYTES)
        try:
            until_s = min(self.end_s, time.monotonic() + chance.uniform(5, 60))
            while time.monotonic() < until_s:
                for _ in range(chance.randrange(1, 200)):
                    self._work(session, chance)
                idle_until_s = time.monotonic() + chance.choice((0.1, 0.5, 3.0, 15.0))
                while time.monotonic() < min(idle_until_s, until_s):
                    session.ping()
                    time.sleep(0.5)
            if chance.random() < 0.5:
                session.close()
        finally:
            session.abandon()  # a second time harms nobody

    def _work(self, session: Session, chance: random.Random) -> None:
        prompt = chance.randrange(400)
        hashes = [sha256(f"{prompt} {at}".encode()).digest() for at in range(chance.randrange(1, 12))]
        session.client.timeout_ms = 60_000
        try:
            if chance.random() < 0.5:
                self.done["loaded"] += len(session.load(hashes))
            else:
                session.store(hashes, [hash_ * 8 for hash_ in hashes])
                self.done["stored"] += len(hashes)
        except (RefusedError, StaleError):
            self.done["refused"] += 1


def run(seconds: float) -> dict:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with workplace() as place:
        place.environment = {SWITCH: "1"}
        server = Server(place, "soak", CAPACITY, address)
        server.wait_populated()
        time.sleep(1)
        soak = Soak(server, address, seconds)
        jobs: list[Callable[[], None]] = [soak.lease, soak.exec_probe]
        jobs += [lambda number=number: soak.engine(number) for number in range(ENGINES)]
        jobs += [lambda page=page: soak.probe(page, 1.0 if page == "/metrics" else 0.1) for page in PAGES]
        threads = [threading.Thread(target=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        health = json.loads(soak.get("/health")[1])
        events = json.loads(soak.get("/health/events")[1])["events"]
        metrics = soak.get("/metrics")[1].decode()
        os.kill(server.pid, signal.SIGTERM)
    return {
        "alarms": soak.alarms,
        "done": dict(soak.done),
        "transitions": dict(
            Counter(
                f"{each['from']} -> {each['to']}: {each['code']} {cause(each)}".strip() for each in events
            )
        ),
        "canary": {
            line.split("{")[1]: line
            for line in metrics.splitlines()
            if line.startswith("cache_server_canary_runs_total")
        },
        "last_canary": health["canary"],
        "answered_within_5_ms": within_5_ms(answered(metrics)),
        "answers_ms": {
            page: {
                "count": len(taken),
                "p50": round(percentile(taken, 50), 2),
                "p99": round(percentile(taken, 99), 2),
                "most": round(max(taken), 2),
            }
            for page, taken in soak.taken_ms.items()
        },
    }


def cause(event: dict) -> str:
    """Whichever engine or number it was."""
    return re.sub(r"[\w-]*\d[\w.-]*", "N", event["reason"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--out", type=Path, help="where the figures go too, as JSON")
    options = parser.parse_args()
    figures = run(options.seconds)
    report = {"machine": machine(), "provenance": provenance(), "seconds": options.seconds, **figures}
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    sys.exit(1 if figures["alarms"] else 0)


if __name__ == "__main__":
    main()
