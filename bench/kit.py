"""What the benchmarks share: a fresh place to work in, child processes, bare sockets, statistics, machine."""

import contextlib
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import zmq

from cache_server.protocol import messages as m
from cache_server.protocol.codec import decode_reply, encode
from cache_server.protocol.presence import SOCKET

ROOT = Path(__file__).resolve().parent.parent
SHARED_MEMORY = "/dev/shm"
ANSWER_DEADLINE_MS = 20_000
GIB = 1 << 30


class Wire:
    """One DEALER that carries bytes and looks at nothing.  All share one I/O thread: what is compared has the
    same client."""

    def __init__(self, path: Path) -> None:
        self.socket = zmq.Context.instance().socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 1)  # so that a start is seen to the millisecond
        self.socket.setsockopt(zmq.RCVTIMEO, ANSWER_DEADLINE_MS)
        self.socket.connect(f"ipc://{path}")
        self.send, self.receive = self.socket.send, self.socket.recv

    def trip(self, request: bytes) -> bytes:
        self.send(request)
        return self.receive()

    def ask(self, request: m.Request) -> m.Reply:
        return decode_reply(self.trip(encode(request)))

    def trips_ns(self, request: bytes, count: int) -> list[int]:
        send, receive, clock = self.send, self.receive, time.perf_counter_ns
        taken: list[int] = []
        for _ in range(count):
            began = clock()
            send(request)
            receive()
            taken.append(clock() - began)
        return taken

    def close(self) -> None:
        self.socket.close()


class Server:
    """One process of the cache server; its runtime dir outlives it."""

    def __init__(self, place: "Workplace", name: str, capacity: str, http: str = "off") -> None:
        self.runtime_dir = place.path / name
        self.socket_path = self.runtime_dir / SOCKET
        options = ["--dir", str(self.runtime_dir), "--capacity", capacity, "--http", http]
        self.began_s = time.perf_counter()
        self.process = place.start("-m", "cache_server", "run", *options, "--log-level", "error")
        self.pid = self.process.pid
        self.wire = Wire(self.socket_path)
        self.wire.ask(m.Ping(id=1))
        self.pong_s = time.perf_counter() - self.began_s

    def status(self) -> dict:
        reply = self.wire.ask(m.Status(id=1))
        assert isinstance(reply, m.StatusReply), reply
        return reply.status

    def wait_populated(self, deadline_s: float = 300) -> None:
        end_s = time.perf_counter() + deadline_s
        while self.status()["arena"]["unpopulated_bytes"]:
            if time.perf_counter() > end_s:
                raise TimeoutError("the arena's memory was not populated in time")
            time.sleep(0.1)

    def kill(self) -> None:
        """kill -9: its arena stays."""
        self.wire.close()
        self.process.kill()
        self.process.wait()


class Workplace:
    """A fresh directory in shared memory and the processes started for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment: dict[str, str] = {}  # beside the clean one
        self.echo_path = path / "echo.sock"
        self.echo_pid = 0

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**clean_environment(), **self.environment},
            stdin=subprocess.DEVNULL,
        )
        self.processes.append(process)
        return process

    def echo(self) -> Wire:
        """A connection to the one echo of this place."""
        if not self.echo_pid:
            self.echo_pid = self.start("-m", "bench.echo", str(self.echo_path)).pid
        wire = Wire(self.echo_path)
        wire.trip(echo_request(8, 8))
        return wire


@contextlib.contextmanager
def workplace() -> Iterator[Workplace]:
    place = Workplace(Path(tempfile.mkdtemp(prefix="cache-server-bench-", dir=SHARED_MEMORY)))
    try:
        yield place
    finally:
        for process in place.processes:
            process.kill()
        for process in place.processes:
            process.wait()
        shutil.rmtree(place.path, ignore_errors=True)


@contextlib.contextmanager
def bounded(seconds: int) -> Iterator[None]:
    """Ends the block with an exception when it takes longer, or when somebody terminates this process."""

    def late(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    def told(_signal: int, _frame: FrameType | None) -> None:
        sys.exit("told to stop")

    signal.signal(signal.SIGALRM, late)
    signal.signal(signal.SIGTERM, told)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def clean_environment() -> dict[str, str]:
    """Nothing that would configure the server or keep Python from using compiled modules."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("CACHE_SERVER_") and name not in {"PYTHONDONTWRITEBYTECODE", "NOTIFY_SOCKET"}
    }


def echo_request(request_bytes: int, reply_bytes: int) -> bytes:
    return reply_bytes.to_bytes(4, "little") + bytes(max(0, request_bytes - 4))


def memory(pid: int) -> dict[str, float]:
    """MiB: `own` is private and file pages, `arena` what it has touched of the arena's tables."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return {
        "own_mib": round((kib["RssAnon"] + kib["RssFile"]) / 1024, 1),
        "anonymous_mib": round(kib["RssAnon"] / 1024, 1),
        "arena_mib": round(kib["RssShmem"] / 1024, 1),
    }


def cpu_ns(pid: int) -> dict[str, int]:
    """CPU time that its threads have had: the main one, and all."""
    by_thread: dict[int, int] = {}
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            by_thread[int(thread.name)] = int((thread / "schedstat").read_text().split()[0])
    return {"main": by_thread[pid], "all": sum(by_thread.values())}


def busy_s() -> float:
    """What all processes of the machine have had of its cores, summed."""
    user, nice, system, _idle, _wait, *rest = (
        int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    )
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def cpu_spent(pid: int, into: dict[str, float]) -> Iterator[None]:
    """Shares of one core that the process' main thread and all its threads took meanwhile."""
    before, began_ns = cpu_ns(pid), time.perf_counter_ns()
    yield
    elapsed_ns, after = time.perf_counter_ns() - began_ns, cpu_ns(pid)
    for name, spent_ns in before.items():
        into[f"{name}_percent"] = round(100 * (after[name] - spent_ns) / elapsed_ns, 1)


def spread(values: Sequence[float], digits: int = 1) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "least": round(min(values), digits),
        "most": round(max(values), digits),
    }


def percentile(values: Sequence[float], percent: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def latency_us(blocks: Sequence[Sequence[int]]) -> dict[str, float]:
    """Of blocks of times in ns: percentiles over all, and how far the blocks' medians lie apart."""
    every = [taken for block in blocks for taken in block]
    medians = [statistics.median(block) / 1_000 for block in blocks]
    return {
        "p50": round(percentile(every, 50) / 1_000, 1),
        "p99": round(percentile(every, 99) / 1_000, 1),
        "least_block_p50": round(min(medians), 1),
        "most_block_p50": round(max(medians), 1),
    }


def interleaved(
    one: Callable[[], list[int]], other: Callable[[], list[int]], rounds: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Blocks of times of the one and the other, in turn; a first block of each is thrown away."""
    one()
    other()
    ones: list[list[int]] = []
    others: list[list[int]] = []
    for _ in range(rounds):
        ones.append(one())
        others.append(other())
    return ones, others


def ratio(ones: Sequence[Sequence[int]], others: Sequence[Sequence[int]]) -> dict[str, float]:
    """Of the medians of neighbouring blocks."""
    pairs = zip(ones, others, strict=True)
    return spread([statistics.median(one) / statistics.median(other) for one, other in pairs], 2)


def machine() -> dict[str, str | int]:
    cpu = next(
        line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    )
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
        "load_average": os.getloadavg()[0],
    }


def provenance() -> dict[str, str | bool]:
    return {
        "commit": _git("rev-parse", "HEAD"),
        "changed_since": bool(_git("status", "--porcelain", "--", "cache_server", "lmconnector", "bench")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout.strip()
