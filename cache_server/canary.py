"""A real minimal job over the real wire and through the real arena, and the thread that does it when told to.

The job is a client like any other, but for a mark: the server counts it nowhere, evicts nothing for it, and
drops what it leaves behind once its lock is free.  One deadline covers all of it, the way out included.
"""

import contextlib
import logging
import os
import secrets
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec

from cache_server.beats import Part
from cache_server.client import RefusedError, UnreachableError
from cache_server.faults import Faults
from cache_server.job import Job
from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError
from cache_server.protocol.messages import Code
from cache_server.protocol.slots import FormatError
from cache_server.report import SlotReport
from cache_server.session import Kind, Session, StaleError
from cache_server.trials import Outcome, Result

log = logging.getLogger(__name__)

TURN_S = 0.5
DEFAULT_PART_BYTES = 1 << 20  # where no size is in use; smaller ones would cut a slab into very many
WORK_PERCENT = 80  # of the deadline; the rest is for the way out
NO_ROOM = (Code.NO_SPACE, Code.BUSY)
HASH_BYTES = 32
Clock = Callable[[], int]


class WrongError(Exception):
    """There was an answer, and it was not the right one."""


class Order(msgspec.Struct, frozen=True):
    runtime_dir: Path
    job: Job
    part_bytes: int
    deadline_ms: int


def part_bytes_for(job: Job, slots: Sequence[SlotReport], most_bytes: int, turn: int) -> int:
    """The sizes in use that have room take turns, unless the job names one."""
    if job.part_bytes:
        return job.part_bytes
    allowed = [slot for slot in slots if slot.slot_bytes <= most_bytes]
    roomy = sorted(slot.slot_bytes for slot in allowed if slot.free >= job.chunks)
    return roomy[turn % len(roomy)] if roomy else min(DEFAULT_PART_BYTES, most_bytes)


class Run:
    """One run; `stage` tells any thread where it is."""

    def __init__(self, order: Order, clock: Clock) -> None:
        self.stage = "connect"
        self._order = order
        self._clock = clock
        self._began_ms = clock()
        self._end_ms = self._began_ms + order.deadline_ms
        self._work_end_ms = self._began_ms + order.deadline_ms * WORK_PERCENT // 100
        self._name = f"canary-{secrets.token_hex(8)}"
        self._session: Session | None = None

    def do(self) -> Outcome:
        result, reason, unanswered = Result.OK, "", False
        try:
            self._work()
        except RefusedError as refusal:
            no_room = self.stage == "reserve" and refusal.code in NO_ROOM
            result, reason = Result.NO_ROOM if no_room else Result.FAILED, str(refusal)
        except UnreachableError:
            unanswered = True
            result, reason = Result.FAILED, f"no answer; the whole run may take {self._order.deadline_ms} ms"
        except (WrongError, StaleError, FormatError, ProtocolError, OSError, AssertionError) as error:
            result, reason = Result.FAILED, f"{type(error).__name__}: {error}"
        finally:
            self._leave()
        stage = "" if result is Result.OK else self.stage
        return Outcome(result, stage, reason, self._clock() - self._began_ms, unanswered)

    def _work(self) -> None:
        job, size = self._order.job, self._order.part_bytes
        kind = Kind(job.window, (m.CANARY,), self._left_ms(self._work_end_ms))
        self.stage = "register"
        namespace = self._name.encode()
        session = self._session = Session(self._order.runtime_dir, self._name, size, namespace, kind)
        slots = self._at("reserve").reserve(job.chunks)
        hashes = [secrets.token_bytes(HASH_BYTES) for _ in slots]
        length = max(1, min(job.check_bytes, size // 2))
        contents = [os.urandom(length) for _ in slots]
        self._at("write")
        for slot, content in zip(slots, contents, strict=True):
            session.write(slot, content)
            session.write(slot, content, size - length)
        outcomes = self._at("commit").commit(hashes, slots)
        _check("outcomes", bytes(outcomes), bytes([m.Outcome.STORED] * len(slots)))
        found = self._at("lookup").lookup(self._name, hashes)
        _check("slots", [slot.number for slot in found], [slot.number for slot in slots[-job.window :]])
        for slot, hash_, content in list(zip(slots, hashes, contents, strict=True))[-job.window :]:
            ends = [self._at("read").read(slot, hash_, first, length) for first in (0, size - length)]
            self.stage = "compare"
            if ends != [content, content]:
                raise WrongError(f"slot {slot.number} does not hold what was written")
        self._at("drop").release(self._name)
        _check("dropped chunks", session.clear(), job.chunks)

    def _at(self, stage: str) -> Session:
        """Enters the stage, with what is left of the deadline."""
        assert self._session is not None, "registered first"
        self.stage = stage
        self._session.client.timeout_ms = self._left_ms(self._work_end_ms)
        return self._session

    def _left_ms(self, end_ms: int) -> int:
        left_ms = end_ms - self._clock()
        if left_ms <= 0:
            raise UnreachableError(f"the deadline has passed at {self.stage}")
        return left_ms

    def _leave(self) -> None:
        """Takes everything along.  To a server that does not answer, the lock that is let go tells it."""
        session, self._session = self._session, None
        if session is None:
            return
        leaving = (session.clear, session.abort_all, session.unregister)
        with contextlib.suppress(UnreachableError, ProtocolError, AssertionError, OSError):
            for step in leaving:
                session.client.timeout_ms = self._left_ms(self._end_ms)
                with contextlib.suppress(RefusedError):
                    step()
        session.abandon()


def _check(what: str, got: object, expected: object) -> None:
    if got != expected:
        raise WrongError(f"{what}: got {got!r}, expected {expected!r}")


class CanaryThread:
    """Does one run at a time; an outcome is told together with the generation it was ordered for."""

    def __init__(self, part: Part, clock: Clock, faults: Faults) -> None:
        self._part = part
        self._clock = clock
        self._faults = faults
        self._orders: SimpleQueue[tuple[int, Order, Callable[[], None]] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[tuple[int, Outcome]] = SimpleQueue()
        self._run: Run | None = None
        self._thread = threading.Thread(target=self._turns, name="canary", daemon=True)

    @property
    def at_stage(self) -> str:
        run = self._run
        return run.stage if run is not None else "connect"

    def start(self) -> None:
        self._thread.start()

    @property
    def lives(self) -> bool:
        return self._thread.is_alive()

    def order(self, generation: int, order: Order, when_done: Callable[[], None]) -> None:
        self._orders.put((generation, order, when_done))

    def take_outcomes(self) -> list[tuple[int, Outcome]]:
        outcomes = []
        with contextlib.suppress(Empty):
            while True:
                outcomes.append(self._outcomes.get_nowait())
        return outcomes

    def stop(self, wait_s: float) -> None:
        self._orders.put(None)
        if self._thread.ident is not None:
            self._thread.join(wait_s)

    def _turns(self) -> None:
        pulse = self._part.begin(self._clock(), threading.current_thread().is_alive)
        while True:
            pulse.tick(self._clock())
            self._faults.at("canary")
            try:
                ordered = self._orders.get(timeout=TURN_S)
            except Empty:
                continue
            if ordered is None:
                break
            generation, order, when_done = ordered
            pulse.tick(self._clock(), since_ms=self._clock())
            self._outcomes.put((generation, self._do(order)))
            when_done()
            pulse.tick(self._clock(), finished=1)
        pulse.end()

    def _do(self, order: Order) -> Outcome:
        self._run = Run(order, self._clock)
        try:
            self._faults.at("canary_job")
            return self._run.do()
        except BaseException as error:
            log.exception("canary: a run ended with a bug at stage %s", self._run.stage)
            return Outcome(Result.FAILED, self._run.stage, f"{type(error).__name__}: {error}")
