"""Steady requests to a real `vllm serve` while its cache server is made to fail, and what that costs them.

Every other prompt is known to the cache, the others are new.  vLLM's own prefix cache is reset before each:
what is a hit is one of the cache server's.
"""

import contextlib
import random
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import msgspec

import other_version
from cache_server.client import Client
from cache_server.protocol import messages as m
from cache_server.protocol.presence import LOCKS, SOCKET
from cache_server.report import Status
from e2e import liars, unprivileged
from e2e.kit import Plain, prompt
from e2e.serving import Serving, Stream
from processes import ServerProcess, eventually, short_dir

KNOWN = 2  # prompts that are asked for again and again
PROMPT_TOKENS = 1_024
ANSWER_TOKENS = 8
STUCK_S = 20.0  # no request may take as long
HITS_DEADLINE_S = 60.0
WATCH_S = 0.0005
CLIENTS_MAX = 100
REPLACED_DEADLINE_S = 20.0


@dataclass
class Asked:
    seed: int
    began_s: float
    stream: Stream | None = None
    error: str = ""

    @property
    def known(self) -> bool:
        return self.seed < KNOWN

    @property
    def hit(self) -> bool:
        return self.stream is not None and self.stream.cached > 0

    @property
    def took_s(self) -> float:
        return self.stream.took_s if self.stream is not None else STUCK_S

    def told(self, since_s: float) -> tuple[str, float, float]:
        kind = "known" if self.known else "new"
        return kind, round(self.began_s - since_s, 3), round(1_000 * self.took_s, 1)

    @property
    def whole(self) -> bool:
        stream = self.stream
        return stream is not None and stream.reason == "length" and len(stream.tokens) == ANSWER_TOKENS


class Traffic:
    """A request every `pace_s` seconds, whatever has become of the earlier ones."""

    def __init__(self, serving: Serving, pace_s: float) -> None:
        self.asked: list[Asked] = []
        self.pace_s = pace_s
        self._serving = serving
        self._ended = threading.Event()
        self._clients = ThreadPoolExecutor(CLIENTS_MAX)
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._clients.shutdown()

    def _send(self) -> None:
        due_s = time.monotonic()
        while not self._ended.wait(max(0.0, due_s - time.monotonic())):
            number = len(self.asked)
            seed = 1_000 + number if number % 2 else number // 2 % KNOWN
            self.asked.append(Asked(seed, time.monotonic()))
            self._clients.submit(self._ask, self.asked[-1])
            due_s += self.pace_s

    def _ask(self, one: Asked) -> None:
        try:
            with contextlib.suppress(AssertionError):  # a block is in use
                self._serving.reset()
            one.began_s = time.monotonic()
            one.stream = self._serving.stream(prompt(one.seed, PROMPT_TOKENS), ANSWER_TOKENS)
        except (OSError, HTTPException, ValueError, AssertionError) as error:
            one.error = f"{type(error).__name__}: {error}"


ONCE = range(1, 2)


@dataclass(frozen=True)
class Fault:
    name: str
    what: str
    apply: Callable[["Rig"], None]
    told: range = ONCE  # how often each process may tell of a degradation, and of a recovery
    unanswered: bool = False  # lookups: requests may wait for their deadline
    has_server: bool = True  # when it begins


@dataclass(frozen=True)
class Outcome:
    """What a fault has cost the requests that began between its beginning and the first hit after it."""

    fault: str
    what: str
    requests: int
    hits: int
    failed: int
    wrong: int
    stuck: int
    over_1_s: int
    worst_ms: float
    worst_added_ms: float  # beyond the median of undisturbed requests of the same kind
    degraded: dict[str, int]  # lines in vLLM's log, by process
    recovered: dict[str, int]
    tracebacks: int
    log_lines: int  # of ours
    hits_again_s: float | None  # from its end to the beginning of the first hit
    each: list[tuple[str, float, float]]  # request: known or new, began in s, took in ms


@dataclass(frozen=True)
class Episode:
    fault: Fault
    asked: list[Asked]
    words: str  # vLLM's log meanwhile
    hits_again_s: float | None

    def took_s(self, *, known: bool) -> list[float]:
        return [one.took_s for one in self.asked if one.known is known]


class Rig:
    def __init__(
        self, serving: Serving, cache: ServerProcess, traffic: Traffic, lasts_s: float, rng: random.Random
    ) -> None:
        self.serving = serving
        self.cache = cache
        self.traffic = traffic
        self.lasts_s = lasts_s
        self.rng = rng
        self.episodes: list[Episode] = []
        self._log_at = 0
        self._honest: ServerProcess | None = None

    def run(self, fault: Fault) -> None:
        if fault.has_server and self.cache.process is None:
            self._begin_with_a_server()
        began = len(self.traffic.asked)
        self.wait(self.rng.uniform(0.0, 2 * self.traffic.pace_s))
        fault.apply(self)
        hits_again_s = self.until_a_hit()
        asked = self.traffic.asked[began:]
        end_s = time.monotonic() + STUCK_S
        while not all(one.stream or one.error for one in asked) and time.monotonic() < end_s:
            self.wait(0.05)
        with self.serving.log.open("rb") as log:
            log.seek(self._log_at)
            words = log.read()
        self._log_at += len(words)
        self.episodes.append(Episode(fault, asked, words.decode(errors="replace"), hits_again_s))

    def _begin_with_a_server(self) -> None:
        self.cache.start()
        self.until_a_hit()
        self._log_at = self.serving.log.stat().st_size

    def until_a_hit(self) -> float | None:
        """-> how long that took"""
        healed_s = time.monotonic()
        while time.monotonic() < healed_s + HITS_DEADLINE_S:
            self.wait(0.02)
            for one in self.traffic.asked[-2 * CLIENTS_MAX :]:
                if one.began_s >= healed_s and one.hit:
                    return one.began_s - healed_s
        return None

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    @contextlib.contextmanager
    def slower(self, pace_s: float) -> Iterator[None]:
        """For what takes long."""
        before, self.traffic.pace_s = self.traffic.pace_s, max(pace_s, self.traffic.pace_s)
        yield
        self.traffic.pace_s = before

    def until(self, probe: Callable[[Status], bool]) -> None:
        """Looks at the server closely."""
        with Client(self.cache.runtime_dir) as client:
            while True:
                reply = client.ask(m.Status(id=client.next_id()), m.StatusReply)
                if probe(msgspec.convert(reply.status, Status)):
                    return
                self.wait(WATCH_S)

    def liar(self, lie: str) -> contextlib.AbstractContextManager[None]:
        command = [liars.__file__, str(self.cache.runtime_dir), lie]
        if lie in liars.BEFORE_A_SERVER:
            command.append(str(self._honest_server().runtime_dir))
        return self._replaced(command)

    def other_version(self) -> contextlib.AbstractContextManager[None]:
        """A real server, of another version of the protocol."""
        run = ["protocol", "run", "--dir", str(self.cache.runtime_dir), *self.cache.options]
        return self._replaced([other_version.__file__, *run, "--log-level", "error"])

    @contextlib.contextmanager
    def _replaced(self, command: list[str]) -> Iterator[None]:
        """Somebody else is in the server's place."""
        self.cache.kill()
        with subprocess.Popen([sys.executable, *command]) as process:
            try:
                eventually(self._somebody_is_there, "somebody in the server's place", REPLACED_DEADLINE_S)
                yield
                assert process.poll() is None, "it has ended"
            finally:
                process.kill()
        self.cache.start()

    def _somebody_is_there(self) -> bool:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as found:
            found.connect(str(self.cache.runtime_dir / SOCKET))
            return True
        return False

    def _honest_server(self) -> ServerProcess:
        """Behind the lies; it knows the engine's locks."""
        if self._honest is None:
            runtime_dir = self.cache.runtime_dir.with_name("honest")
            runtime_dir.mkdir(mode=0o700)
            (runtime_dir / LOCKS).symlink_to(self.cache.runtime_dir / LOCKS)
            self._honest = ServerProcess(runtime_dir, *self.cache.options)
            self._honest.start()
            self._honest.populated()
        return self._honest

    def close(self) -> None:
        if self._honest is not None:
            self._honest.kill()

    def outcomes(self, plain: Plain) -> list[Outcome]:
        """`plain` is asked only now: it would have taken time from the others."""
        undisturbed = next(episode for episode in self.episodes if 0 in episode.fault.told)
        medians_s = {known: statistics.median(undisturbed.took_s(known=known)) for known in (True, False)}
        return [judged(episode, medians_s, plain) for episode in self.episodes]


@contextlib.contextmanager
def rig(
    model: Path, folder: Path, connector: dict[str, object], *, pace_s: float, lasts_s: float, seed: int
) -> Iterator[Rig]:
    """The server is yet to be started; vLLM serves."""
    with short_dir() as place, contextlib.ExitStack() as stack:
        cache = ServerProcess(place / "dir", "--capacity", "256MiB")
        stack.callback(cache.kill)
        options = {**connector, "dir": str(cache.runtime_dir)}
        bound = (sys.executable, unprivileged.__file__)
        serving = stack.enter_context(Serving(folder / "serve.log", folder / "stubs", model, options, *bound))
        traffic = stack.enter_context(Traffic(serving, pace_s))
        made = Rig(serving, cache, traffic, lasts_s, random.Random(seed))
        stack.callback(made.close)
        yield made


def judged(episode: Episode, medians_s: dict[bool, float], plain: Plain) -> Outcome:
    asked, words = episode.asked, episode.words
    served = [(one, one.stream) for one in asked if one.stream is not None]
    right = plain.said(*(prompt(one.seed, PROMPT_TOKENS) for one, _ in served), tokens=ANSWER_TOKENS)
    return Outcome(
        fault=episode.fault.name,
        what=episode.fault.what,
        requests=len(asked),
        hits=sum(one.hit for one in asked),
        failed=sum(not one.whole for one in asked),
        wrong=sum(stream.said != said for (_, stream), said in zip(served, right, strict=True)),
        stuck=sum(one.took_s >= STUCK_S for one in asked),
        over_1_s=sum(one.took_s > 1.0 for one in asked),
        worst_ms=round(1_000 * max(one.took_s for one in asked), 1),
        worst_added_ms=round(1_000 * max(one.took_s - medians_s[one.known] for one in asked), 1),
        degraded=lines_by_process(words, r"\w+ -> degraded"),
        recovered=lines_by_process(words, "recovering -> healthy"),
        tracebacks=words.count("Traceback"),
        log_lines=sum("lmconnector" in line or "health: " in line for line in words.splitlines()),
        hits_again_s=episode.hits_again_s,
        each=[one.told(asked[0].began_s) for one in asked],
    )


def lines_by_process(words: str, change: str) -> dict[str, int]:
    """Of the heartbeats: `(EngineCore pid=7) WARNING ... health: healthy -> degraded why=...`"""
    return dict(Counter(re.findall(rf"^\((\w+) pid=\d+\).* health: {change} ", words, re.MULTILINE)))
