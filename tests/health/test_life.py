"""The threads around a server: they leave nothing behind, and what comes over the wire ends none of them."""

import contextlib
import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import zmq

from cache_server.canary import CanaryThread
from cache_server.clock import monotonic_ms
from cache_server.http import HttpSide
from cache_server.protocol import messages as m
from cache_server.protocol.codec import encode
from cache_server.protocol.keys import owner_of
from cache_server.watch import Watch
from health.live import Live, live
from processes import eventually

CYCLES = 20
ROUNDS = 1_000


def own_threads() -> list[str]:
    """What ZeroMQ runs is not Python's."""
    return sorted(thread.name for thread in threading.enumerate())


def descriptors() -> int:
    """When those of the last runs' locks are closed, which the loop looks at every 0.4 s."""
    counts = []
    for _ in range(20):
        counts.append(len(os.listdir("/proc/self/fd")))
        time.sleep(0.05)
    return min(counts)


@contextlib.contextmanager
def watched(running: Live) -> Iterator[tuple[Watch, HttpSide]]:
    """Everything that the daemon starts."""
    canary = CanaryThread(running.vitals.canary, monotonic_ms, running.vitals.faults)
    watch = Watch(running.config, running.vitals, canary, monotonic_ms)
    watch.source = lambda: running.server.published
    side = HttpSide("127.0.0.1:0")
    side.start(watch)
    watch.start()
    eventually(lambda: watch.told.verdict.started, "started")
    try:
        yield watch, side
    finally:
        watch.stop()
        side.close()


def watched_life(running: Live) -> None:
    with watched(running) as (_watch, side):
        health = f"http://127.0.0.1:{side.port}/health"
        assert json.loads(urllib.request.urlopen(health, timeout=20).read())["schema"] == 1


def test_trap_27_threads_and_descriptors_are_gone_after_each_of_many_lives() -> None:
    threads = own_threads()
    counts: list[int] = []
    for _ in range(CYCLES):
        with live() as running:
            watched_life(running)
        assert own_threads() == threads
        counts.append(descriptors())
    assert counts[-1] <= counts[1], counts


CANARY_RUNS = 1_000


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_trap_27_a_thousand_runs_and_questions_leave_memory_threads_and_descriptors_as_they_were() -> None:
    with live(canary_idle="off") as running, watched(running) as (watch, side):
        marks: list[tuple[int, list[str], int]] = []
        for number in range(CANARY_RUNS):
            generation = watch.ask_deep()
            asked = urllib.request.urlopen(f"http://127.0.0.1:{side.port}/health", timeout=20)
            with asked as page:
                page.read()
            eventually(lambda at=generation: watch.told.record.generation >= at, "the run")
            if number % (CANARY_RUNS // 5) == CANARY_RUNS // 5 - 1:
                marks.append((descriptors(), own_threads(), resident_bytes()))
        assert watch.told.record.counts["ok"] >= CANARY_RUNS
        assert watch.told.record.failures == 0
        (fds, threads, first_bytes), *later = marks
        assert all(each[1] == threads for each in later)
        assert later[-1][0] <= fds + 1
        assert later[-1][2] - first_bytes < 4 << 20, [each[2] for each in marks]


def test_threads_that_take_turns_ever_so_often_agree() -> None:
    """Who publishes, judges, asks and answers at once, with a switch between any two steps."""
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with live(canary_idle="off") as running, watched(running) as (watch, side):

            def ask(number: int) -> int:
                with urllib.request.urlopen(page_of(side, number), timeout=60) as page:
                    said = json.load(page)
                record, published = watch.told.record, running.server.published
                assert sum(record.counts.values()) == record.generation, "of one moment"
                assert published.status is not None
                assert published.status.boot == said["boot"]
                assert said["live"]
                return page.status

            with ThreadPoolExecutor(8) as pool:
                codes = list(pool.map(ask, range(ROUNDS)))
            assert codes == [200] * ROUNDS
            record = watch.told.record
            assert sum(record.counts.values()) == record.generation == record.counts["ok"]
            assert record.late == 0
            assert [each.new.value for each in watch.told.verdict.transitions] == ["ready"]
            assert watch.told.dumps == 0
    finally:
        sys.setswitchinterval(interval_s)


def page_of(side: HttpSide, number: int) -> str:
    paths = ("health?deep=1", "health", "live", "ready", "health/events")
    return f"http://127.0.0.1:{side.port}/{paths[number % len(paths)]}"


def test_trap_18_whatever_comes_gets_a_reply_and_the_loop_goes_on() -> None:
    def broken(_name: str) -> bool:
        raise ZeroDivisionError

    with live() as running, zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.RCVTIMEO, 20_000)
        peer.connect(f"ipc://{running.config.runtime_dir / 'server.sock'}")
        register = m.Register(
            id=3, version_min=1, version_max=1, engine="e", role="scheduler", namespace=b"n", proof="0.0"
        )
        running.service._is_locked = broken
        owned = msgspec.structs.replace(register, proof=f"{owner_of('e').hex()}.1")
        for frames, code in (
            ([b"\xc1 no map"], "MALFORMED"),
            ([b"", b""], "MALFORMED"),
            ([msgspec.msgpack.encode({"op": "teleport", "id": 1})], "UNKNOWN_OP"),
            ([encode(owned)], "INTERNAL"),
        ):
            peer.send_multipart(frames)
            assert msgspec.msgpack.decode(peer.recv())["code"] == code
        peer.send(encode(m.Ping(id=9)))
        assert msgspec.msgpack.decode(peer.recv())["op"] == "pong"
