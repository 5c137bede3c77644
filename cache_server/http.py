"""The HTTP side: which pages there are, and the thread that serves them.

The port is taken before anything else, so that a taken one is a clear refusal; the thread answers from then
on, also while the server starts, while its main loop stands still, and until its end.
"""

import logging
import socket
import threading
from hashlib import blake2b

import msgspec

from cache_server import answers
from cache_server.answers import JSON, Answer, Facts
from cache_server.beats import Awake
from cache_server.clock import monotonic_ms
from cache_server.config import Config
from cache_server.counters import Histogram
from cache_server.pages import Pages, Waiting, flag
from cache_server.status_page import PATH, status_page
from cache_server.watch import GAP_MS, Watch, judge

log = logging.getLogger(__name__)

BACKLOG = 512
DEEP_SLACK_MS = 1_000  # beyond the canary's deadline


class AddressError(Exception):
    """The port can't be had; the message says why and what to do."""


class HttpSide:
    def __init__(self, address: str) -> None:
        """Takes the port; nobody is answered before `start`."""
        try:
            self._socket = _listener(address)
        except OSError as error:
            raise AddressError(
                f"http = {address!r}: {error.strerror}: choose another --http, or off"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, watch: Watch) -> None:
        self._thread = threading.Thread(target=self._turns, args=(watch,), name="http", daemon=True)
        self._thread.start()
        log.info("http: listening on port %d", self.port)

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._socket.close()

    def _turns(self, watch: Watch) -> None:
        pulse = watch.vitals.http.begin(monotonic_ms(), threading.current_thread().is_alive)
        answering = Answering(watch)
        pages = Pages(self._socket, answering.pages, monotonic_ms, answering.note)
        try:
            while not self._stop.is_set():
                watch.vitals.faults.at("http")
                now_ms = monotonic_ms()
                pulse.tick(now_ms)
                answering.turn(now_ms)
                pages.turn()
            pulse.end()
        finally:
            pages.close()
            answering.pages.clear()  # they hold the one that holds them, and with it a server that has ended


class Answering:
    """From what the others have published to answers; used by the HTTP thread alone."""

    def __init__(self, watch: Watch) -> None:
        config = watch.config
        self._watch = watch
        self._config_hash = _config_hash(config)
        self._awake = Awake(GAP_MS)
        self._latency: dict[str, Histogram] = {}
        self._metrics: tuple[int, Answer] | None = None
        page = status_page(config)
        self.pages = {
            config.live_path: lambda now_ms, _: answers.live(self._facts(now_ms)),
            config.ready_path: lambda now_ms, _: answers.ready(self._facts(now_ms)),
            config.startup_path: lambda now_ms, _: answers.startup(self._facts(now_ms)),
            config.health_path: self._health,
            config.events_path: lambda now_ms, _: answers.events(self._facts(now_ms)),
            config.metrics_path: lambda now_ms, _: self._exposition(now_ms),
            "/status": lambda now_ms, _: self._status(now_ms),
            PATH: lambda _now_ms, _query: page,
        }
        names = ("live", "ready", "startup", "health", "events", "metrics")
        self._names = {getattr(config, f"{name}_path"): name for name in names}
        self._names |= {"/status": "status", PATH: "page"}

    def turn(self, now_ms: int) -> None:
        self._awake.note(now_ms)

    def note(self, path: str, us: int) -> None:
        self._latency.setdefault(self._names[path], Histogram()).observe(us)

    def _facts(self, now_ms: int) -> Facts:
        watch = self._watch
        awake_ms = self._awake.note(now_ms)  # a process that was stopped may wake up with a question
        told, published = watch.told, watch.source()
        return Facts(
            now_ms=now_ms,
            born_ms=watch.born_ms,
            boot=published.boot,
            ready_while_starting=watch.config.starting_status == "ready",
            asked_to_stop=published.draining,
            verdict=told.verdict,
            parts=watch.vitals.parts,
            judged=judge(watch.vitals.parts, now_ms, awake_ms),
            endpoints=published.endpoints,
            record=told.record,
            holds=told.holds,
            config_hash=self._config_hash,
        )

    def _health(self, now_ms: int, query: str) -> Answer | Waiting:
        if not flag(query, "deep"):
            return answers.health(self._facts(now_ms))
        generation = self._watch.ask_deep()
        until_ms = now_ms + 2 * self._watch.config.canary_deadline + DEEP_SLACK_MS

        def answer(now_ms: int) -> Answer | None:
            facts = self._facts(now_ms)
            known = facts.record.generation >= generation or now_ms >= until_ms or not facts.verdict.started
            return answers.deep(facts, generation) if known else None

        return Waiting(answer)

    def _status(self, now_ms: int) -> Answer:
        status = self._watch.source().status
        if status is None:
            return answers.startup(self._facts(now_ms))
        return Answer(200, JSON, msgspec.json.encode(status))

    def _exposition(self, now_ms: int) -> Answer:
        from cache_server.metrics import exposition  # noqa: PLC0415  100 ms that the start need not wait for
        from cache_server.vital_metrics import VitalMetrics  # noqa: PLC0415

        facts, told = self._facts(now_ms), self._watch.told
        vital = VitalMetrics(facts, told.canary_latency, told.dumps, dict(self._latency))
        return Answer(200, *exposition(self._watch.source().status, vital))


def _listener(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()  # who names no address wants to be reached at any
    return socket.create_server((host, int(port)), family=family, backlog=BACKLOG, dualstack_ipv6=both)


def _config_hash(config: Config) -> str:
    return blake2b(msgspec.json.encode(config), digest_size=8).hexdigest()
