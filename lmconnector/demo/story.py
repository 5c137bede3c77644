"""The story: requests go on all the time, while the cache server comes, is killed and returns.

Threading: the load and the reader of vLLM's log post what they see to one queue; all else is in one thread.
"""

import queue
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

from lmconnector.config import Options
from lmconnector.demo.healthlog import read_change
from lmconnector.demo.load import Asked, Load, ask, words
from lmconnector.demo.processes import Child, DemoError, cache_server, restored_chunks
from lmconnector.demo.terminal import BLUE, BOLD, DIM, GREEN, RED, YELLOW, Terminal
from lmconnector.demo.timeline import Change, Marks, Phase, Request, Run, overall

CHUNK_TOKENS = Options().chunk_tokens
DOCUMENTS = 4
DOCUMENT_TOKENS = 11 * CHUNK_TOKENS
QUESTION_TOKENS = 64
ANSWER_TOKENS = 8
HITS_EACH = 3
DEAD_REQUESTS = 6
PHASE_DEADLINE_S = 120.0
BAR_WIDTH = 40
INDENT = " " * 11
HEALTH_STYLES = {"healthy": GREEN, "degraded": RED}

Event = Asked | Request | Change


class NotSeenError(Exception):
    """What the story waits for did not happen in time."""


class Story:
    def __init__(self, terminal: Terminal, directory: Path, log: Path, machine: str) -> None:
        self._terminal = terminal
        self._directory = directory
        self._log = log
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._zero_s = 0.0
        self._asked = False  # a request runs
        self._health = ""
        self.server: Child | None = None
        self._living: list[Child] = []  # and expected to
        self.run = Run(
            machine=machine,
            documents=DOCUMENTS,
            document_tokens=DOCUMENT_TOKENS,
            chunk_tokens=CHUNK_TOKENS,
            answer_tokens=ANSWER_TOKENS,
            marks=Marks(),
            requests=[],
            changes=[],
        )

    def on_engine_line(self, line: str, at_s: float) -> None:
        change = read_change(line, at_s)
        if change is not None:
            self._events.put(change)

    def play(self, port: int, engine: Child) -> Run:
        self._living = [engine]
        question = words("question", QUESTION_TOKENS)
        prompts = [words(f"document {number}", DOCUMENT_TOKENS) + question for number in range(DOCUMENTS)]
        self._warm_up(port, words("warm-up", DOCUMENT_TOKENS + QUESTION_TOKENS))
        self._zero_s = time.monotonic()
        load = Load(port, prompts, ANSWER_TOKENS, self._events.put, self._now_s)
        load.start()
        try:
            for chapter in (self._no_server, self._server_starts, self._server_dies, self._server_returns):
                self._wait_for(chapter())
        except NotSeenError as error:
            self.run.unfinished = str(error)
        finally:
            load.stop()
        while not self._events.empty():
            self._take(self._events.get())
        if self.run.marks.restarted_s is not None:
            try:
                self.run.restored_chunks = restored_chunks(self._directory)
            except DemoError as error:
                self.run.unfinished = self.run.unfinished or str(error)
        return self.run

    # The chapters: each tells what happens and why, and then what it waits for.

    def _no_server(self) -> Iterable[tuple[str, Callable[[], bool]]]:
        self._tell(
            "No cache server yet",
            "vLLM computes every prompt. Each later answer is compared with these.",
        )
        yield (
            "an answer about each document without a cache server",
            lambda: len(self.run.references()) == DOCUMENTS,
        )

    def _server_starts(self) -> Iterable[tuple[str, Callable[[], bool]]]:
        self._tell(
            "A cache server starts",
            "Nobody tells vLLM: its heartbeat finds the server. A document that is seen for the first time "
            "is computed and stored; from then on it is loaded.",
        )
        self.run.marks.started_s = self._start_server()
        yield f"{HITS_EACH} hits on each document", lambda: self._all_hit(Phase.UP)

    def _server_dies(self) -> Iterable[tuple[str, Callable[[], bool]]]:
        self._tell(
            "kill -9 of the cache server, while a request runs",
            "Nothing is tidied up, nobody is told. vLLM has to notice, and to go on without.",
        )
        yield "a request that runs", lambda: self._asked
        assert self.server is not None, "it was started"
        self._living.remove(self.server)
        self.run.marks.killed_s = self.server.kill() - self._zero_s
        self._terminal.line(f"  {self._now_s():5.1f} s  $ kill -9 {self.server.pid}", RED)
        yield (
            f"{DEAD_REQUESTS} answers without the cache server",
            lambda: len(self.run.answered([Phase.DEAD])) >= DEAD_REQUESTS,
        )

    def _server_returns(self) -> Iterable[tuple[str, Callable[[], bool]]]:
        self._tell(
            "The cache server starts again",
            "It takes over the memory of the dead one. vLLM notices by itself and registers; what was stored "
            "before the kill is there.",
        )
        self.run.marks.restarted_s = self._start_server()
        yield f"{HITS_EACH} hits on each document after the restart", lambda: self._all_hit(Phase.BACK)

    def _wait_for(self, chapter: Iterable[tuple[str, Callable[[], bool]]]) -> None:
        for what, seen in chapter:
            until_s = time.monotonic() + PHASE_DEADLINE_S
            while not seen():
                for child in self._living:
                    child.check_alive()
                if time.monotonic() > until_s:
                    raise NotSeenError(f"waited in vain for {what}, for {PHASE_DEADLINE_S:.0f} s")
                try:
                    self._take(self._events.get(timeout=1.0))
                except queue.Empty:
                    continue

    def _all_hit(self, phase: Phase) -> bool:
        hits = Counter(request.document for request in self.run.answered([phase], hit=True))
        return all(hits[document] >= HITS_EACH for document in range(DOCUMENTS))

    def _start_server(self) -> float:
        """-> when"""
        at_s = self._now_s()
        self.server = cache_server(self._directory, self._log)
        self._living.append(self.server)
        self._terminal.command(self.server.typed, INDENT)
        return at_s

    def _warm_up(self, port: int, prompt: list[int]) -> None:
        request = ask(port, 0, prompt, ANSWER_TOKENS, time.monotonic)
        if request.error:
            raise DemoError(f"vLLM did not answer its first request: {request.error}")

    def _now_s(self) -> float:
        return time.monotonic() - self._zero_s

    # What is seen

    def _take(self, event: Event) -> None:
        match event:
            case Asked():
                self._asked = True
            case Request():
                self._asked = False
                self.run.requests.append(event)
                self._show_request(event)
            case Change():
                at_s = max(0.0, event.at_s - self._zero_s)  # 0: it was so when the first request came
                self.run.changes.append(msgspec.structs.replace(event, at_s=at_s))
                self._show_health()

    def _tell(self, title: str, why: str) -> None:
        self._terminal.line()
        self._terminal.line(f"  {self._now_s():5.1f} s  {title}", BOLD)
        self._terminal.item(INDENT, why, DIM)

    def _show_request(self, request: Request) -> None:
        head = f"  {request.end_s:5.1f} s  document {request.document + 1}"
        if request.error:
            self._terminal.line(f"{head}  failed: {request.error}", RED)
            return
        worst_ms = max(each.ttft_ms for each in self.run.requests)
        length = max(1, round(BAR_WIDTH * request.ttft_ms / worst_ms))
        source, style = ("from the cache", BLUE) if request.hit else ("computed", YELLOW)
        bar = self._terminal.bar(length, style)
        self._terminal.line(f"{head}  {request.ttft_ms:5.0f} ms  {bar} {source}")

    def _show_health(self) -> None:
        at_s, state, why = overall(self.run.changes)[-1]
        if state != self._health:
            self._health = state
            style = HEALTH_STYLES.get(state, YELLOW)
            self._terminal.item(f"  {at_s:5.1f} s  ", f"vLLM's log: the cache is {state}: {why}", style)
