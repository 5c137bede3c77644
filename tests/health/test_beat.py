"""What a real server's main loop says of itself, its ticks played: requests that wait, and are served."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from shutil import rmtree

import pytest

from cache_server.beats import Motion
from cache_server.client import Client, UnreachableError
from cache_server.clock import monotonic_ms
from cache_server.health import findings_of
from cache_server.protocol import messages as m
from cache_server.vitals import LOOP_TURN_MS
from cache_server.watch import judge
from health.live import Live
from processes import eventually

WORK_AGE_MS = 5_000


@pytest.fixture
def idle() -> Iterator[Live]:
    """Its loop does not run: the test ticks."""
    directory = Path(tempfile.mkdtemp(prefix="csb-", dir="/dev/shm"))
    running = Live(directory, {"work_age": f"{WORK_AGE_MS}ms"})
    try:
        yield running
    finally:
        running.server.close()
        running.vitals.close()
        rmtree(directory)


def ticked(running: Live, from_ms: int, passed_ms: int) -> Motion:
    for now_ms in range(from_ms, from_ms + passed_ms + 1, LOOP_TURN_MS):
        running.server._tick(now_ms)
    return judge(running.vitals.parts, from_ms + passed_ms, 0)["loop"].motion


def asked(running: Live) -> None:
    with contextlib.suppress(UnreachableError), Client(running.config.runtime_dir, 50) as client:
        client.ask(m.Ping(id=1), m.Pong)


def test_a_loop_that_turns_and_serves_none_of_what_waits_is_livelocked(idle: Live) -> None:
    now_ms = monotonic_ms()
    assert ticked(idle, now_ms, 10 * WORK_AGE_MS) is Motion.IDLE, "nothing waits: of any length, no alarm"
    now_ms += 10 * WORK_AGE_MS
    with Client(idle.config.runtime_dir, 50) as client:
        with pytest.raises(UnreachableError):
            client.ask(m.Ping(id=1), m.Pong)
        eventually(lambda: idle.server._socket.poll(0), "its request waits")
        assert ticked(idle, now_ms, WORK_AGE_MS) is Motion.MOVING
        assert ticked(idle, now_ms + WORK_AGE_MS, LOOP_TURN_MS) is Motion.LIVELOCKED
        now_ms += WORK_AGE_MS + LOOP_TURN_MS
        (finding,) = findings_of(idle.vitals.parts, judge(idle.vitals.parts, now_ms, 0))
        assert finding.reason.startswith("loop: moves, but its oldest work is ")
        idle.server._serve()
        assert ticked(idle, now_ms, LOOP_TURN_MS) is Motion.IDLE


def test_a_loop_that_serves_on_is_not_livelocked_however_much_waits(idle: Live) -> None:
    now_ms = monotonic_ms()
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(idle.config.runtime_dir, 1)) for _ in range(60)]
        for client in clients:
            with contextlib.suppress(UnreachableError):
                client.ask(m.Ping(id=1), m.Pong)
        eventually(lambda: idle.server._socket.poll(0), "requests wait")
        served = 0
        while idle.server._socket.poll(0):
            idle.server._serve()
            served += 1
            assert ticked(idle, now_ms, LOOP_TURN_MS) in (Motion.MOVING, Motion.IDLE)
            now_ms += WORK_AGE_MS // 2
        assert served > 10
