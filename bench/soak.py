"""A hundred thousand good requests by engines that come and go: does anything of the server grow?"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

from bench.kit import Server, bounded, machine, provenance, workplace
from cache_server.protocol.messages import Outcome
from cache_server.session import Session

REQUESTS = 100_000
CAPACITY = "16MiB"  # it is full long before the warm-up ends
ENGINES = 8  # at a time
ROUNDS_OF_AN_ENGINE = 200
PART_BYTES = 4096
PROMPTS = 4_096  # that come again: the server remembers uses beyond eviction, up to a bound that is far away
REQUESTS_PER_ROUND = 5  # PING, RESERVE, COMMIT, LOOKUP, RELEASE
SAMPLES = 40
WARM_UP = 0.25  # of all requests
TIME_MAX_S = 1_200


@dataclass(frozen=True)
class Sample:
    requests: int
    at_s: float
    rss_anon_kib: int
    fds: int
    threads: int


@dataclass(frozen=True)
class Growth:
    """From the end of the warm-up on: the most of the second half beyond the most of the first."""

    rss_anon_kib: int
    fds: int
    threads: int


class Engines:
    """Each stores and loads, and looks at what it gets; then another one takes its place, half of the time
    without a word of farewell."""

    def __init__(self, runtime_dir: Path) -> None:
        self.requests = self.lives = 0
        self._runtime_dir = runtime_dir
        self._rounds = 0
        self._sessions = deque(self._next_one() for _ in range(ENGINES))

    def go_round(self) -> None:
        if self._rounds % (ROUNDS_OF_AN_ENGINE // ENGINES) == 0:
            self._leave(self._sessions.popleft())
            self._sessions.append(self._next_one())
        self._rounds += 1
        session = self._sessions[self._rounds % ENGINES]
        assert session.ping().known
        prompt = self._rounds % PROMPTS
        hashes = [sha256(b"%d %d" % (prompt, number)).digest() for number in range(2)]
        contents = [hash_ * (PART_BYTES // len(hash_)) for hash_ in hashes]
        assert set(session.store(hashes, contents)) <= {Outcome.STORED, Outcome.EXISTS}
        assert session.load(hashes) == contents
        self.requests += REQUESTS_PER_ROUND

    def close(self) -> None:
        for session in self._sessions:
            session.close()

    def _next_one(self) -> Session:
        self.lives += 1
        self.requests += 1
        return Session(self._runtime_dir, f"engine-{self.lives}", PART_BYTES)

    def _leave(self, session: Session) -> None:
        if self.lives % 2:
            session.abandon()
        else:
            session.close()
            self.requests += 1


def soak(runtime_dir: Path, pid: int, requests: int) -> Iterator[Sample]:
    """Samples of the server's process, spread over the requests."""
    began_s = time.perf_counter()
    with contextlib.closing(Engines(runtime_dir)) as engines:
        for number in range(1, SAMPLES + 1):
            while engines.requests < requests * number // SAMPLES:
                engines.go_round()
            yield sample(pid, engines.requests, time.perf_counter() - began_s)


def sample(pid: int, requests: int, at_s: float) -> Sample:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    told = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "Threads"))}
    fds = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(requests, round(at_s, 1), int(told["RssAnon"]), fds, int(told["Threads"]))


def growth(samples: Sequence[Sample]) -> Growth:
    warm = samples[int(WARM_UP * len(samples)) :]
    early, late = warm[: len(warm) // 2], warm[len(warm) // 2 :]

    def grown(name: str) -> int:
        return max(getattr(each, name) for each in late) - max(getattr(each, name) for each in early)

    return Growth(grown("rss_anon_kib"), grown("fds"), grown("threads"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with bounded(TIME_MAX_S), workplace() as place:
        server = Server(place, "soak", CAPACITY)
        server.wait_populated()
        samples = []
        for each in soak(server.runtime_dir, server.pid, options.requests):
            samples.append(each)
            print(
                f"{each.requests:8} requests {each.at_s:6.1f} s  RssAnon {each.rss_anon_kib} KiB  "
                f"{each.fds} fds  {each.threads} threads",
                flush=True,
            )
        server.kill()
    grown = growth(samples)
    print(f"after the warm-up: {grown}")
    if options.out is not None:
        result = {
            **provenance(),
            "machine": machine(),
            "samples": [asdict(each) for each in samples],
            "growth": asdict(grown),
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
