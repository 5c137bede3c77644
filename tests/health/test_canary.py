"""The canary over the real wire, through the real arena; also against servers that lose or twist replies."""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cache_server.beats import Bounds, Part
from cache_server.canary import CanaryThread, Order
from cache_server.clock import monotonic_ms
from cache_server.deep import do_job
from cache_server.eviction import Lru
from cache_server.faults import SWITCH, Faults
from cache_server.index import Index
from cache_server.job import Job
from cache_server.protocol import messages as m
from cache_server.protocol.messages import Outcome
from cache_server.session import Kind, Session
from cache_server.storage import Storage
from cache_server.trials import Result
from health.live import Live, honest, live
from kit import chain
from processes import eventually

CHUNK = 256 << 10
TIMEOUTS = 100
CHECKS = 12
DEADLINE_MS = 300
SLACK_MS = 500  # a busy machine's


def fill(running: Live, session: Session) -> int:
    """Until everything is committed and no more fits without eviction; -> chunks stored"""
    count = 0
    while not running.service.storage.evicted:
        session.store([os.urandom(32)], [b"x"])
        count += 1
    return count


JOBS = [
    "{}",
    '{"chunks": 3}',
    '{"chunks": 4, "window": 2}',
    '{"part_bytes": 1}',
    '{"part_bytes": 5000, "check_bytes": 99999}',
]


@pytest.mark.parametrize("job", JOBS)
def test_a_good_server_passes_and_nothing_shows(job: str) -> None:
    with live(canary_job=job) as running:
        before = running.traces()
        for _ in range(3):
            outcome = running.canary()
            assert (outcome.result, outcome.reason) == (Result.OK, "")
        assert running.traces() == before
        eventually(lambda: not list((running.config.runtime_dir / "locks").iterdir()), "its file is removed")


def test_in_a_full_arena_it_passes_and_evicts_nothing() -> None:
    with live() as running:
        session = Session(running.config.runtime_dir, "engine", CHUNK)
        fill(running, session)
        eventually(lambda: running.server.published.status.slots, "a fresh snapshot")
        before = running.traces()
        for turn in range(3):
            assert running.canary(turn=turn).result is Result.OK
        assert running.traces() == before
        session.close()


def test_where_nothing_is_free_it_says_so_and_evicts_nothing() -> None:
    with live(canary_job='{"part_bytes": 4096}') as running:
        session = Session(running.config.runtime_dir, "engine", CHUNK)
        fill(running, session)
        before = running.traces()
        outcome = running.canary()
        assert (outcome.result, outcome.stage) == (Result.NO_ROOM, "reserve")
        assert "a canary evicts nothing" in outcome.reason
        assert running.traces() == before
        session.close()


def test_it_is_marked_in_the_list_of_workers() -> None:
    seen: list[bool] = []
    with live() as running:

        def twist(request: m.Request, reply: m.Reply) -> m.Reply:
            if isinstance(request, m.Reserve):
                running.server._look_around(monotonic_ms())
                seen.extend(row.canary for row in running.server.endpoints.workers)
                assert sum(running.server.snapshot.workers.values()) == 0
            return reply

        running.server.twist = twist
        assert running.canary().result is Result.OK
    assert seen == [True]


class Mute:
    """Answers until `op` and no more."""

    def __init__(self, op: type[m.Request]) -> None:
        self.op = op
        self.silent = False

    def __call__(self, request: m.Request, reply: m.Reply) -> m.Reply | None:
        self.silent = self.silent or isinstance(request, self.op)
        return None if self.silent else reply


STAGES = {
    m.Register: "register",
    m.Reserve: "reserve",
    m.Commit: "commit",
    m.Lookup: "lookup",
    m.Clear: "drop",
}


@pytest.mark.parametrize(
    ("op", "stage"), STAGES.items(), ids=lambda each: each if isinstance(each, str) else ""
)
def test_trap_19_a_server_that_falls_silent_halfway_fails_the_run_at_that_stage(
    op: type[m.Request], stage: str
) -> None:
    with live(reclaim_grace="0ms") as running:
        before, threads = running.traces(), threading.active_count()
        descriptors = len(os.listdir("/proc/self/fd"))
        running.server.twist = Mute(op)
        began_ms = monotonic_ms()
        outcome = running.canary(deadline_ms=DEADLINE_MS)
        assert (outcome.result, outcome.stage) == (Result.FAILED, stage)
        assert "no answer" in outcome.reason
        assert monotonic_ms() - began_ms < DEADLINE_MS + SLACK_MS, "one deadline over all of it"
        eventually(lambda: running.traces() == before, "nothing left")
        assert threading.active_count() == threads
        assert len(os.listdir("/proc/self/fd")) <= descriptors
        eventually(lambda: not list((running.config.runtime_dir / "locks").iterdir()), "its file is removed")


class Slow:
    """Answers everything, each time so long after it was asked."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self.answers = 0

    def __call__(self, request: m.Request, reply: m.Reply) -> m.Reply:
        self.answers += 1
        time.sleep(self.delay_s)
        return reply


def test_trap_19_a_server_that_answers_each_step_in_time_and_all_of_them_too_late_fails_the_run() -> None:
    with live(reclaim_grace="0ms") as running:
        before = running.traces()
        running.server.twist = slow = Slow(DEADLINE_MS * 0.3 / 1_000)
        began_ms = monotonic_ms()
        outcome = running.canary(deadline_ms=DEADLINE_MS)
        took_ms = monotonic_ms() - began_ms
        assert slow.answers >= 2, "it was answered"
        assert outcome.result is Result.FAILED
        assert outcome.stage != "register", "one answer alone is in time"
        assert "no answer; the whole run may take 300 ms" in outcome.reason
        assert took_ms < DEADLINE_MS + SLACK_MS
        running.server.twist = honest
        eventually(lambda: running.traces() == before, "nothing left")


def test_many_deep_checks_at_once_are_few_jobs_and_one_at_a_time() -> None:
    with live(canary_deadline="9s") as running:
        running.server.twist = Slow(0.02)
        together = threading.Barrier(CHECKS)

        def check(_number: int) -> tuple[int, str]:
            together.wait()
            return do_job(running.config)

        with ThreadPoolExecutor(CHECKS) as pool:
            told = list(pool.map(check, range(CHECKS)))
        assert {code for code, _ in told} == {0}, told
        jobs = running.service.canaries.counters.latency["register"].count
        assert 1 <= jobs <= 3, "who asked before a job began takes its outcome"
        assert len({words for _, words in told}) <= jobs
        assert do_job(running.config)[0] == 0
        assert running.service.canaries.counters.latency["register"].count == jobs + 1, "no old one"


def test_many_deep_checks_of_a_mute_server_fail_within_the_deadline() -> None:
    with live(canary_deadline="300ms") as running:
        running.server.twist = Mute(m.Reserve)
        began_ms = monotonic_ms()
        with ThreadPoolExecutor(CHECKS) as pool:
            told = list(pool.map(lambda _: do_job(running.config), range(CHECKS)))
        assert {code for code, _ in told} == {1}
        assert monotonic_ms() - began_ms < DEADLINE_MS + SLACK_MS
        running.server.twist = honest


def test_trap_20_a_hundred_timeouts_leave_nothing_behind() -> None:
    with live(reclaim_grace="0ms") as running:
        before = running.traces()
        ops = list(STAGES)
        for number in range(TIMEOUTS):
            running.server.twist = Mute(ops[number % len(ops)])
            assert running.canary(deadline_ms=30).result is Result.FAILED
        running.server.twist = lambda _, reply: reply
        eventually(lambda: running.traces() == before, "nothing left")
        assert running.canary().result is Result.OK


def test_trap_24_an_error_packed_as_data_fails_the_run() -> None:
    def orphaned(request: m.Request, reply: m.Reply) -> m.Reply:
        if isinstance(reply, m.Committed):
            return m.Committed(id=reply.id, boot=reply.boot, outcomes=bytes([Outcome.ORPHAN]))
        return reply

    def forgetful(request: m.Request, reply: m.Reply) -> m.Reply:
        return m.Found(id=reply.id, boot=reply.boot, chunks=0) if isinstance(reply, m.Found) else reply

    with live() as running:
        for twist, stage in ((orphaned, "commit"), (forgetful, "lookup")):
            running.server.twist = twist
            outcome = running.canary()
            assert (outcome.result, outcome.stage) == (Result.FAILED, stage)
            assert outcome.reason.startswith("WrongError: ")


def test_trap_24_bytes_that_changed_fail_the_run() -> None:
    with live() as running:
        arena = running.service.storage.arena
        path = running.config.runtime_dir / "arena"

        def spoil(request: m.Request, reply: m.Reply) -> m.Reply:
            if isinstance(request, m.Commit):
                (space,) = running.service.storage.index.spaces
                (chunk,) = space.chunks.values()
                with path.open("r+b") as file:
                    file.seek(chunk.slot.offset + arena.slab_of(chunk.slot.number).slot_bytes - 1)
                    last = file.read(1)
                    file.seek(-1, os.SEEK_CUR)
                    file.write(bytes([last[0] ^ 1]))
            return reply

        running.server.twist = spoil
        outcome = running.canary()
        assert (outcome.result, outcome.stage) == (Result.FAILED, "compare")
        assert "does not hold what was written" in outcome.reason


def test_trap_21_a_canary_killed_halfway_leaves_nothing_now_or_after_a_restart() -> None:
    with live(reclaim_grace="0ms") as running:
        before = running.traces()
        kind_session = marked_session(running)
        kind_session.store([bytes(32)], [b"left behind"])
        assert running.service.storage.canary_chunks == 1
        assert running.server.describe().chunks.stored == 0
        kind_session.abandon()  # kill -9: no word, and the lock is free
        eventually(lambda: running.traces() == before, "nothing left")
        later = marked_session(running)
        later.store([bytes(32)], [b"left behind"])
        arena_file = running.server._file
        restored = arena_file.arena(9, 0)  # as a successor would take it over
        assert len(restored.inherited) == 1
        assert Storage(restored, Index(Lru)).restored == 0
        later.abandon()


def marked_session(running: Live) -> Session:
    return Session(running.config.runtime_dir, "canary-x", CHUNK, b"canary-x", Kind(0, (m.CANARY,)))


def test_real_chunks_beside_it_are_untouched() -> None:
    with live(reclaim_grace="0ms") as running:
        session = Session(running.config.runtime_dir, "engine", CHUNK)
        hashes = chain(5)
        session.store(hashes, list(hashes))
        for _ in range(3):
            assert running.canary().result is Result.OK
        assert [content[:32] for content in session.load(hashes)] == hashes
        assert running.service.counters.lookups == 1
        session.close()


def test_a_paused_server_is_still_proven_and_a_draining_one_is_not() -> None:
    with live() as running:
        running.server.orders.pause_until_ms = monotonic_ms() + 60_000
        eventually(lambda: running.service.paused, "paused")
        assert running.canary().result is Result.OK
        running.server.orders.pause_until_ms = 0
        running.service.draining = True
        assert running.canary().stage == "register"
        running.service.draining = False


def test_trap_03_whatever_ends_a_run_the_thread_lives_to_tell_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SWITCH, "1")
    part = Part("canary", Bounds(1_000, 2_000), critical=False)
    thread = CanaryThread(part, monotonic_ms, Faults(tmp_path))
    thread.start()
    for generation in (1, 2):
        (tmp_path / "fault.canary_job").write_text("die")
        told = threading.Event()
        thread.order(generation, Order(tmp_path, Job(), 4096, 1_000), told.set)
        assert told.wait(10)
        ((heard, outcome),) = thread.take_outcomes()
        assert heard == generation
        assert (outcome.result, outcome.reason.strip()) == (Result.FAILED, "SystemExit:")
        assert thread.lives
    thread.stop(10)
    assert not thread.lives
