"""The thread that watches: it judges every part, keeps the server's state, and has the canary run.

It reads what the others publish and waits for none of them.  What it publishes itself is `told`, an immutable
object; the HTTP side adds to it what it sees at the moment of the answer.
"""

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Protocol

import msgspec

from cache_server.beats import Awake, Judgement, Motion, Part
from cache_server.canary import Order, part_bytes_for
from cache_server.config import Config
from cache_server.counters import Histogram
from cache_server.health import (
    Health,
    Phase,
    Transition,
    Verdict,
    canary_findings,
    endpoint_findings,
    fatal,
    findings_of,
    hold_findings,
    is_ready,
    why,
)
from cache_server.hold_file import read_holds
from cache_server.holds import Hold
from cache_server.published import NOTHING, Published
from cache_server.report import Latency
from cache_server.trials import Outcome, Record, Result, Trials
from cache_server.vitals import TURN_MS, Vitals

log = logging.getLogger(__name__)

TURN_S = TURN_MS / 1_000
GAP_MS = 3 * TURN_MS
JOIN_S = 5.0
CANARY_JOIN_S = 0.2  # a run that is on may find nobody to answer it any more


class Told(msgspec.Struct, frozen=True):
    verdict: Verdict
    record: Record
    canary_latency: Latency
    dumps: int = 0
    holds: tuple[Hold, ...] = ()


class Canary(Protocol):
    """Who does the runs: a thread of its own, or a simulation of one."""

    @property
    def lives(self) -> bool: ...
    @property
    def at_stage(self) -> str: ...
    def start(self) -> None: ...
    def order(self, generation: int, order: Order, when_done: Callable[[], None]) -> None: ...
    def take_outcomes(self) -> list[tuple[int, Outcome]]: ...
    def stop(self, wait_s: float) -> None: ...


Source = Callable[[], Published]


class Watch:
    def __init__(self, config: Config, vitals: Vitals, canary: Canary, clock: Callable[[], int]) -> None:
        now_ms = clock()
        self._clock = clock
        self.vitals = vitals
        self.config = config
        self.born_ms = now_ms
        self.source: Source = lambda: NOTHING
        self.alive: Callable[[], None] = lambda: None  # called at every turn that finds the process live
        self._health = Health(now_ms, _log_transition)
        self._trials = Trials(config.trial_rules, now_ms)
        self._canary = canary
        self._took = Histogram()
        self._awake = Awake(GAP_MS)
        self._wake = threading.Event()
        self._stopping = False
        self._deep_wanted = 0  # the generation that somebody waits for
        self._leased_ms = -1
        self._logged = (Result.OK, "")  # the same again is not news
        self._thread = threading.Thread(target=self._turns, name="watch", daemon=True)
        self.told = Told(self._health.verdict, self._trials.record(), Latency(tuple(self._took.counts), 0))

    def start(self) -> None:
        self._thread.start()
        self._canary.start()

    def stop(self) -> None:
        self._canary.stop(CANARY_JOIN_S)
        self._stopping = True
        self._wake.set()
        self._thread.join(JOIN_S)

    def ask_deep(self) -> int:
        """Has the canary run, or joins the run that is on; -> the generation whose outcome is the answer."""
        self._deep_wanted = self.told.record.generation + 1
        self._wake.set()
        return self._deep_wanted

    def _turns(self) -> None:
        pulse = self.vitals.watch.begin(self._clock(), threading.current_thread().is_alive)
        while not self._stopping:
            self.vitals.faults.at("watch")
            now_ms = self._clock()
            pulse.tick(now_ms)
            self.turn(now_ms)
            self._wake.wait(TURN_S)
            self._wake.clear()
        self.turn(self._clock())
        pulse.end()

    def turn(self, now_ms: int) -> None:
        parts, published = self.vitals.parts, self.source()
        awake_ms = self._awake.note(now_ms)
        judged = judge(parts, now_ms, awake_ms)
        if judged["loop"].motion is Motion.LEASED:
            self._leased_ms = now_ms
        self._look_after_the_canary(published, now_ms)
        record = self._trials.record()
        proven_ms = published.endpoints.proven_ms if published.endpoints else None
        holds = read_holds(self.config.runtime_dir, now_ms)
        findings = [
            *findings_of(parts, judged),
            *hold_findings(holds),
            *canary_findings(record, self._trials.rules, judged["canary"], proven_ms, now_ms),
            *endpoint_findings(published.endpoints),
        ]
        verdict = self._health.judge(self._phase(published, record), findings, now_ms)
        latency = Latency(tuple(self._took.counts), self._took.sum_us)
        self.told = Told(verdict, record, latency, self._health.dumps, holds)
        self._tell_the_page(verdict, now_ms)
        if fatal(verdict.findings) is None:
            self.alive()
        incident = self._health.wants_dump(judged, now_ms)
        if incident:
            log.error(
                "health: stacks of all threads why=%r\n%s", f"stalled: {', '.join(incident)}", _stacks()
            )

    def _phase(self, published: Published, record: Record) -> Phase:
        if published.stopped:
            return Phase.STOPPED
        if published.draining:
            return Phase.DRAINING
        proven = not self.config.canary_idle or record.failed or record.proven
        if not published.turned or (not proven and not self._health.verdict.started):
            return Phase.STARTING
        return Phase.PAUSED if published.paused else Phase.WORKING

    def _look_after_the_canary(self, published: Published, now_ms: int) -> None:
        trials = self._trials
        for generation, outcome in self._canary.take_outcomes():
            if trials.end(generation, outcome, now_ms, self._leased_ms):
                self._note()
            else:
                log.warning("canary: run %d has come to an end, too late to count", generation)
        if trials.give_up(self._canary.at_stage, now_ms, self._leased_ms):
            self._note()
        status = published.status
        busy = self._leased_ms == now_ms  # what could answer has said that it won't for a while
        if status is None or not published.turned or published.draining or busy or not self._canary.lives:
            return
        proven_ms = published.endpoints.proven_ms if published.endpoints else None
        asked = self._deep_wanted > trials.begun and trials.may_begin
        if asked or trials.is_due(now_ms, proven_ms):
            generation = trials.begin(now_ms)
            job = self.config.canary_job
            size = part_bytes_for(job, status.slots, self.config.canary_bytes_max, generation)
            order = Order(self.config.runtime_dir, job, size, self.config.canary_deadline)
            self._canary.order(generation, order, self._wake.set)

    def _note(self) -> None:
        outcome = self._trials.record().last
        assert outcome is not None, "a run has just ended"
        self._took.observe(outcome.took_ms * 1_000)
        if outcome.reason and (outcome.result, outcome.stage) != self._logged:
            log.warning("canary: %s at %s: %s", outcome.result.value, outcome.stage, outcome.reason)
        self._logged = (outcome.result, outcome.stage)

    def _tell_the_page(self, verdict: Verdict, now_ms: int) -> None:
        worst = fatal(verdict.findings)
        ready = is_ready(verdict, ready_while_starting=self.config.starting_status == "ready")
        code, reason = (worst.code, worst.reason) if worst else (verdict.code, verdict.reason)
        text = f"{verdict.state.value} {why(code, reason)}"
        self.vitals.page.watch_turned(now_ms, live=worst is None, ready=ready and worst is None, text=text)


def judge(parts: tuple[Part, ...], now_ms: int, awake_ms: int) -> dict[str, Judgement]:
    return {part.name: part.judge(now_ms, awake_ms) for part in parts}


def _log_transition(transition: Transition) -> None:
    log.info(
        'health: %s -> %s why="%s" lasted_ms=%d',
        transition.old.value, transition.new.value, transition.why, transition.lasted_ms,
    )  # fmt: skip


def _stacks() -> str:
    """Of all threads but the one that asks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()  # noqa: SLF001  there is no other way to them
        if ident != threading.get_ident()
    )
