"""What 1,000 registered workers that ping once a second cost, and what somebody else notices of them."""

import os
import resource
import sys
import time
from pathlib import Path

import zmq

from bench.kit import Server, Wire, Workplace, cpu_spent, interleaved, latency_us, ratio, spread, workplace
from cache_server.protocol import messages as m
from cache_server.protocol.codec import decode_reply, encode
from cache_server.protocol.presence import SOCKET, Presence, presence_name

WORKERS = 1_000
PROCESSES = 2
PROBE_INTERVAL_S = 0.005
REGISTER_DEADLINE_S = 120.0


def measure(*, quick: bool) -> dict:
    workers, seconds = (200, 3.0) if quick else (WORKERS, 20.0)
    with workplace() as place:
        crowded = Server(place, "crowded", "256MiB")
        quiet = Server(place, "quiet", "256MiB")  # the same with nobody on it, at the same time
        crowded.wait_populated()
        quiet.wait_populated()
        began_s = time.perf_counter()
        _start_workers(place, crowded, workers)
        connected_s = time.perf_counter() - began_s
        figures = _probe(crowded, quiet, seconds)
        figures |= {
            "workers": workers,
            "processes": PROCESSES,
            "connected_s": round(connected_s, 2),
            "connected_at_end": _ready(crowded),
            "refused": crowded.status()["refused"],
            "descriptors": len(os.listdir(f"/proc/{crowded.pid}/fd")),
        }
        crowded.kill()
        quiet.kill()
    return figures


def _start_workers(place: Workplace, server: Server, workers: int) -> None:
    share = workers // PROCESSES
    for number in range(PROCESSES):
        options = (str(server.runtime_dir), str(number), str(share))
        place.start("-m", "bench.server_workers", *options)
    end_s = time.perf_counter() + REGISTER_DEADLINE_S
    while _ready(server) < share * PROCESSES:
        if time.perf_counter() > end_s:
            raise TimeoutError(f"{_ready(server)} of {workers} workers registered in time")
        time.sleep(0.05)
    time.sleep(2)  # everybody has pinged


def _ready(server: Server) -> int:
    return server.status()["workers"]["ready"]


def _probe(crowded: Server, quiet: Server, seconds: float) -> dict:
    """PINGs to both servers in turn, 200 a second, and the CPU time that both take."""
    request = encode(m.Ping(id=1))

    def block(server: Server) -> list[int]:
        taken: list[int] = []
        for _ in range(50):
            time.sleep(PROBE_INTERVAL_S)
            taken += server.wire.trips_ns(request, 1)
        return taken

    rounds = max(2, round(seconds / (2 * 50 * PROBE_INTERVAL_S)))
    share: dict[str, float] = {}
    share_quiet: dict[str, float] = {}
    with cpu_spent(crowded.pid, share), cpu_spent(quiet.pid, share_quiet):
        crowded_ns, quiet_ns = interleaved(lambda: block(crowded), lambda: block(quiet), rounds)
    alone: dict[str, float] = {}
    with cpu_spent(quiet.pid, alone):
        time.sleep(min(seconds, 5))
    return {
        "cpu": share,
        "cpu_without_workers": share_quiet,
        "cpu_idle": alone,
        "ping_us": latency_us(crowded_ns),
        "ping_us_without_workers": latency_us(quiet_ns),
        "ping_ratio_p50": ratio(crowded_ns, quiet_ns),
        "ping_slowest_us": spread([max(block) / 1_000 for block in crowded_ns]),
    }


class Worker:
    """An engine with one worker; sends its PINGs and takes the answers when it sends the next."""

    def __init__(self, runtime_dir: Path, name: str) -> None:
        self.presence = Presence(runtime_dir, presence_name(name))
        self.wire = Wire(runtime_dir / SOCKET)
        registered = self.wire.ask(
            m.Register(
                id=1,
                version_min=m.VERSION_MIN,
                version_max=m.VERSION_MAX,
                engine=name,
                role="worker",
                namespace=b"bench",
                proof=self.presence.name,
                pid=os.getpid(),
                phase="ready",
                layout=m.Layout(groups=(m.Group(4096),)),
            )
        )
        assert isinstance(registered, m.Registered), registered
        self._ping = encode(m.Ping(id=1, session=registered.session))
        self.wire.send(self._ping)

    def beat(self) -> None:
        pong = decode_reply(self.wire.receive())
        assert isinstance(pong, m.Pong), pong
        assert pong.known, "the server has forgotten this worker"
        self.wire.send(self._ping)


def work(runtime_dir: Path, number: int, count: int) -> None:
    """`count` workers that ping every second, evenly spread over it, until their starter ends."""
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    parent = os.getppid()
    zmq.Context.instance().set(zmq.MAX_SOCKETS, count + 16)
    workers = [Worker(runtime_dir, f"engine-{number}-{each}") for each in range(count)]
    due_s = time.perf_counter()
    while os.getppid() == parent:
        for worker in workers:
            due_s += 1 / count
            time.sleep(max(0.0, due_s - time.perf_counter()))
            worker.beat()


def summary(figures: dict) -> list[tuple[str, str]]:
    ping, quiet, slowest = figures["ping_us"], figures["ping_us_without_workers"], figures["ping_slowest_us"]
    return [
        ("workers connected", f"{figures['connected_at_end']} in {figures['connected_s']} s"),
        (
            "server's share of a core",
            f"{figures['cpu']['all_percent']} %; idle {figures['cpu_idle']['all_percent']} %",
        ),
        (
            "PING of somebody else",
            f"p50 {ping['p50']} p99 {ping['p99']} us; slowest of 50: {slowest['median']} us",
        ),
        ("  without workers", f"p50 {quiet['p50']} p99 {quiet['p99']} us"),
    ]


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
