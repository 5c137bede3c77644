"""Asks every health endpoint of one server again and again, and remembers what each said, and when.

The exec probes are asked as `cache-server check` asks them, without the start of a process each time.
"""

import contextlib
import itertools
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from cache_server.check import look
from cache_server.clock import monotonic_ms
from cache_server.config import Config

EVERY_S = 0.05
DEEP_EVERY_S = 1.0  # each is a whole job
ANSWER_WITHIN_S = 1.0  # as long as a kubelet waits by default
PAGES = ("/live", "/ready", "/startup", "/health")
CHECKS = ("live", "ready", "deep")
SILENCE = "no answer"
FINE = dict.fromkeys(PAGES, "200 ok") | {f"check --{check}": "exit 0" for check in CHECKS}


class Answer(NamedTuple):
    asked_s: float
    got_s: float
    said: str


class Change(NamedTuple):
    """An answer that is not as the one before it: it came about between the two."""

    least_s: float  # when the one before was asked for
    most_s: float  # when this one was there
    said: str


@dataclass
class Log:
    """What one endpoint said; `list.append` is all that its thread does to it."""

    answers: list[Answer] = field(default_factory=list)

    def since(self, from_s: float) -> list[Answer]:
        """What was asked for after that moment."""
        return [answer for answer in self.answers if answer.asked_s >= from_s]

    def changes(self, from_s: float) -> list[Change]:
        return [
            Change(max(from_s, before.asked_s), answer.got_s, answer.said)
            for before, answer in itertools.pairwise(self.answers)
            if answer.got_s >= from_s and answer.said != before.said
        ]


class Probes:
    def __init__(self, config: Config, port: int) -> None:
        self._config, self._port = config, port
        self._over = threading.Event()
        self.logs = {endpoint: Log() for endpoint in FINE}
        asked: list[tuple[str, Callable[[], str], float]] = [
            *((page, self._page(page), EVERY_S) for page in PAGES),
            *((f"check --{kind}", self._check(kind), EVERY_S) for kind in ("live", "ready")),
            ("check --deep", self._check("deep"), DEEP_EVERY_S),
        ]
        self._threads = [threading.Thread(target=self._ask, args=each, daemon=True) for each in asked]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def wait_fine(self, deadline_s: float = 60) -> None:
        """Until each has last said that all is well."""
        end_s = time.monotonic() + deadline_s
        while unwell := {
            name: log.answers[-1:] for name, log in self.logs.items() if not self._is_fine(name)
        }:
            if time.monotonic() > end_s:
                raise TimeoutError(f"not well within {deadline_s} s: {unwell}")
            time.sleep(EVERY_S)

    def _is_fine(self, name: str) -> bool:
        answers = self.logs[name].answers
        return bool(answers) and answers[-1].said == FINE[name]

    def _ask(self, endpoint: str, ask: Callable[[], str], every_s: float) -> None:
        log = self.logs[endpoint]
        while not self._over.wait(every_s):
            asked_s = time.monotonic()
            said = ask()
            log.answers.append(Answer(asked_s, time.monotonic(), said))

    def _page(self, page: str) -> Callable[[], str]:
        return lambda: page_said(self._port, page)

    def _check(self, kind: str) -> Callable[[], str]:
        return lambda: f"exit {look(self._config, kind, monotonic_ms()).exit_code}"


def trip(port: int, page: str, timeout_s: float = 30) -> bytes:
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as client:
        client.sendall(f"GET {page} HTTP/1.1\r\n\r\n".encode())
        answer = b""
        while got := client.recv(1 << 16):
            answer += got
    return answer


def page_said(port: int, page: str) -> str:
    """The status, and the code that says why."""
    try:
        head, _, body = trip(port, page, ANSWER_WITHIN_S).partition(b"\r\n\r\n")
    except OSError:
        return SILENCE
    return f"{head.split()[1].decode()} {json.loads(body)['code']}" if body else SILENCE


def answered(metrics: str) -> Counter[tuple[str, str]]:
    """How many answers took at most so long, by limit and page, as the server measured it: from a request's
    receipt to the end of its answer."""
    prefix = 'cache_server_http_seconds_bucket{le="'
    found: Counter[tuple[str, str]] = Counter()
    for line in metrics.splitlines():
        if line.startswith(prefix):
            limit, _, page = line.removeprefix(prefix).split('"')[:3]
            found[limit, page] = int(float(line.rpartition(" ")[2]))
    return found


def within_5_ms(counts: Counter[tuple[str, str]]) -> dict[str, str]:
    all_of = {page: count for (limit, page), count in sorted(counts.items()) if limit == "+Inf" and count}
    return {page: f"{100 * counts['0.005', page] / count:.2f} %" for page, count in all_of.items()}


@contextlib.contextmanager
def asking(config: Config, port: int) -> Iterator[Probes]:
    probes = Probes(config, port)
    probes.start()
    try:
        yield probes
    finally:
        probes.stop()
