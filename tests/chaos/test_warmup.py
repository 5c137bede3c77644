"""From an engine's warm-up to hours of idleness: no ping too early, no false alarm, nobody forgotten."""

import logging
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from cache_server.protocol import messages as m
from cache_server.protocol.presence import LOCKS
from engine_side import MemoryLink
from kit import KIB, World
from lmconnector import heartbeat, membership
from lmconnector.config import Options
from lmconnector.geometry import GroupLayout
from lmconnector.link import Event, ZmqLink
from lmconnector.membership import Member, registration
from lmconnector.transfer import new_transfer
from logs import told_by
from processes import ServerProcess, eventually, server, short_dir

pytestmark = pytest.mark.chaos

GROUPS = (m.Group(4 * KIB),)
LAYOUT = m.Layout(groups=GROUPS, part=0, parts=1)
MINUTE_MS = 60_000
WARM_UP_MS = 20 * MINUTE_MS
IDLE_MS = 6 * 60 * MINUTE_MS


def worker(runtime_dir: Path, name: str = "engine") -> Member:
    options = Options(dir=str(runtime_dir), heartbeat_interval_s=0.2, heartbeat_timeout_s=0.2)
    transfer = new_transfer([torch.zeros(4, 4 * KIB, dtype=torch.uint8)], (GroupLayout(32, 1, 0),))
    return Member(options, registration(name, 0, 1, b"model", LAYOUT), transfer)


def states(process: ServerProcess) -> list[tuple[str, int]]:
    return [(row.state, row.pings) for row in process.status().worker_rows]


def test_a_worker_that_warms_up_is_known_and_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, heartbeat.log.name)
    with server("--silent-after", "1s") as process:
        member = worker(process.runtime_dir)
        member.announce()
        assert states(process) == [("warming", 0)]
        time.sleep(3.0)  # three times as long as a ready one may be silent
        assert states(process) == [("warming", 0)], "no ping, and no alarm"
        assert "lmconnector-heartbeat" not in [thread.name for thread in threading.enumerate()]
        assert not told_by(caplog, heartbeat.log)
        member.heartbeat.ensure_started()
        eventually(lambda: states(process)[0][0] == "ready", "ready")
        eventually(lambda: states(process)[0][1] > 2, "pings")
        assert member.map is not None
        member.close()
        assert states(process) == []
        assert [line.split()[3] for line in told_by(caplog, heartbeat.log)] == [
            "recovering",
            "healthy",
            "stopped",
        ]


def test_a_server_that_dies_during_the_warm_up_is_no_news_to_the_worker(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with server() as process:
        member = worker(process.runtime_dir)
        member.announce()
        process.restart()
        assert not told_by(caplog, heartbeat.log)
        assert not told_by(caplog, membership.log)
        member.heartbeat.ensure_started()
        eventually(lambda: member.usable, "usable")
        member.close()


def test_without_a_server_the_warm_up_goes_on_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with short_dir() as directory:
        member = worker(directory / "absent")
        member.announce()
        assert not told_by(caplog, membership.log), "it is not needed yet"
        member.close()


class SimulatedLink(MemoryLink):
    """To a service in memory, which looks after its engines while time passes."""

    def send(self, request: m.Request) -> bool:
        if isinstance(request, m.Register):
            self.world.locked.add(request.proof)  # the file is really locked
        return super().send(request)

    def poll(self, timeout_ms: int) -> list[Event]:
        events, self.waiting = self.waiting, []
        if not events:
            assert self.world.pass_ms(timeout_ms) == [], "nobody is taken for dead"
        return events


def test_a_long_warm_up_and_an_idle_day(caplog: pytest.LogCaptureFixture) -> None:
    """The real heartbeat and the real service, in simulated time."""
    caplog.set_level(logging.DEBUG, "vllm.lmconnector")
    world = World()
    links: list[SimulatedLink] = []

    def new_link() -> SimulatedLink:
        links.append(SimulatedLink(world))
        return links[-1]

    def state() -> str:
        (row,) = world.service.registry.engines["engine"].members.values()
        return row.state(world.now_ms, world.limits.silent_after_ms).value

    with short_dir() as directory:
        (directory / LOCKS).mkdir()
        worker = registration("engine", 0, 1, b"model", LAYOUT)
        member = Member(Options(dir=str(directory)), worker, None, new_link, lambda: world.now_ms)
        member.heartbeat._run = lambda work: work()
        member.announce()
        for _ in range(WARM_UP_MS // MINUTE_MS):
            assert world.pass_ms(MINUTE_MS) == []
            assert state() == "warming"
        assert [kind for link in links for kind in link.kinds()] == ["Register"], "and not one ping"
        assert not told_by(caplog, heartbeat.log)
        assert not told_by(caplog, membership.log)

        member.heartbeat.begin()
        member.heartbeat.step()
        known, ends_ms = member.heartbeat.membership, world.now_ms + IDLE_MS
        while world.now_ms < ends_ms:
            member.heartbeat.step()
            assert state() == "ready"
            assert member.usable
        assert member.heartbeat.membership is known, "known all the time"
        pings = [request for link in links for request in link.asked if isinstance(request, m.Ping)]
        assert 0.9 <= len(pings) / (IDLE_MS / 1_000) <= 1.1
        told = [record for record in caplog.records if record.name == heartbeat.log.name]
        assert [record.getMessage().split()[3] for record in told] == ["recovering", "healthy"]
        assert max(record.levelno for record in told) == logging.INFO
        member.heartbeat.end()
        member.close()
        assert world.service.registry.engines == {}


@pytest.mark.parametrize("answers", [True, False])
def test_at_the_end_the_heartbeat_goes_first_and_the_proof_of_life_last(answers: bool) -> None:
    """Else it would register again what was unregistered, or the server would free what is still in use."""
    with server("--canary-idle", "off") as process:
        member = worker(process.runtime_dir)
        member.heartbeat.ensure_started()
        eventually(lambda: member.usable, "usable")
        noted: list[tuple[int, int]] = []

        class Noting(ZmqLink):
            def send(self, request: m.Request) -> bool:
                if isinstance(request, m.Unregister):
                    beats = [thread.name for thread in threading.enumerate()].count("lmconnector-heartbeat")
                    noted.append((beats, len(list((process.runtime_dir / LOCKS).iterdir()))))
                return super().send(request)

        member._new_link = lambda: Noting(process.runtime_dir)
        if not answers:
            os.kill(process.pid, signal.SIGSTOP)
        began_s = time.monotonic()
        member.close()
        assert time.monotonic() - began_s < 2.0
        assert set(noted) == {(0, 1)}, "when nothing beat any more, and the lock was still held"
        os.kill(process.pid, signal.SIGCONT)
        eventually(lambda: not list((process.runtime_dir / LOCKS).iterdir()), "its file is removed")
        eventually(lambda: states(process) == [], "forgotten")


def test_an_interval_too_long_for_the_server_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "vllm.lmconnector")
    with server("--silent-after", "1s") as process:
        options = Options(dir=str(process.runtime_dir), heartbeat_interval_s=0.5)
        member = Member(options, registration("engine", 0, 1, b"model"))
        for _ in range(3):  # as after each of the server's restarts
            member._register()
        assert told_by(caplog, membership.log) == [
            "register: pings come every heartbeat_interval_s = 0.5 s, and the server takes us for silent"
            " after 1 s: give the engine a shorter interval, or the server --silent-after 1.65s"
        ]
        member.close()


def test_the_usual_interval_is_short_enough(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "vllm.lmconnector")
    with server() as process:
        member = Member(Options(dir=str(process.runtime_dir)), registration("engine", 0, 1, b"model"))
        member._register()
        assert not told_by(caplog, membership.log)
        member.close()
