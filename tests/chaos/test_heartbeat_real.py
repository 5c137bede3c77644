"""The heartbeat against real servers that are killed, frozen, restarted, absent, or liars."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from cache_server.client import RefusedError, UnreachableError
from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError, decode_request, encode
from cache_server.protocol.presence import LOCKS, SOCKET
from cache_server.session import Session
from lmconnector import heartbeat
from lmconnector.errors import RegistrationError
from lmconnector.health import State, Timing
from lmconnector.heartbeat import Heartbeat, Membership
from lmconnector.link import ZmqLink
from processes import ServerProcess, eventually, server, short_dir

pytestmark = pytest.mark.chaos

PART_BYTES = 4096
CALM = Timing(interval_ms=60_000, timeout_ms=2_000)  # no ping is due while a test lasts
QUICK = Timing(interval_ms=1_000, timeout_ms=1_000, fail_after=2)
HASTY = Timing(interval_ms=50, timeout_ms=50, hold_ms_max=200)
JOIN_MS = 10_000
PINGS = 10  # heard by a liar before it is judged
GONE_S = 0.3  # from a server's kill -9 to the shut gate; it takes a few ms
BACK_S = 6.0  # from an honest server's start, after whatever was there before it, to the open gate


class Registrar(Session):
    """Registers when it is asked to, not when it is made."""

    def register(self) -> None:
        pass

    def register_now(self) -> Membership:
        super().register()
        return Membership(self.session, self.boot)


class Engine(logging.Handler):
    """A heartbeat, and the lines it logs."""

    def __init__(self, runtime_dir: Path, timing: Timing) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.heart = Heartbeat(lambda: ZmqLink(runtime_dir), self._register, timing)
        self._runtime_dir = runtime_dir
        self._registrar: Registrar | None = None
        heartbeat.log.setLevel(logging.DEBUG)  # also what was told before
        heartbeat.log.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def end(self) -> None:
        self.heart.stop(JOIN_MS)
        heartbeat.log.removeHandler(self)
        assert "lmconnector-heartbeat" not in threads()
        eventually(lambda: "lmconnector-register" not in threads(), "the end of the registration")
        self._abandon()
        self._check_lines()

    def is_in(self, state: State) -> bool:
        return self.heart.health.state is state

    def becomes(self, state: State, deadline_s: float = 20.0) -> None:
        eventually(lambda: self.is_in(state), f"{state}, after {self.lines}", deadline_s)

    def tells(self, words: str, times: int = 1) -> None:
        try:
            eventually(lambda: sum(words in line for line in self.lines) == times, words)
        except AssertionError as error:
            raise AssertionError(f"{words}: {times} times in {self.lines}") from error

    def _register(self) -> Membership:
        try:
            if self._registrar is None:
                (self._runtime_dir / LOCKS).stat()  # half a session would be hard to close
                self._registrar = Registrar(self._runtime_dir, "engine", PART_BYTES)
            return self._registrar.register_now()
        except (RefusedError, UnreachableError, ProtocolError, AssertionError, OSError) as error:
            self._abandon()
            raise RegistrationError(f"{type(error).__name__}: {error}") from error

    def _abandon(self) -> None:
        registrar, self._registrar = self._registrar, None
        if registrar is not None:
            registrar.abandon()

    def _check_lines(self) -> None:
        """One line for each transition."""
        steps = [line.split()[1:4:2] for line in self.lines]
        assert all(line.startswith("health: ") and " lasted_ms=" in line for line in self.lines)
        assert steps[0][0] == State.DORMANT.value
        assert steps[-1][1] == State.STOPPED.value
        assert [old for old, _ in steps[1:]] == [new for _, new in steps[:-1]]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


@contextlib.contextmanager
def engine_of(runtime_dir: Path, timing: Timing) -> Iterator[Engine]:
    engine = Engine(runtime_dir, timing)
    engine.heart.ensure_started()
    try:
        yield engine
    finally:
        engine.end()


def test_a_killed_server_is_missed_at_once_and_its_successor_found_at_once() -> None:
    with server() as process, engine_of(process.runtime_dir, CALM) as engine:
        took_s = []
        for outage in range(1, 4):
            engine.becomes(State.HEALTHY)
            took_s.append(until_shut_s(process, engine))
            engine.becomes(State.DEGRADED)
            engine.tells('healthy -> degraded why="connection closed"', outage)
            process.start()
            engine.becomes(State.HEALTHY)
            engine.tells(" unusable_ms=", 1 + outage)
        assert not any("unanswered" in line for line in engine.lines), "no ping had to be missed"
        assert min(took_s) < GONE_S, took_s
        assert max(took_s) < 5 * GONE_S, f"on however busy a machine: {took_s}"


def until_shut_s(process: ServerProcess, engine: Engine) -> float:
    began_s = time.monotonic()
    process.kill()
    while engine.heart.usable:
        assert time.monotonic() - began_s < JOIN_MS / 1_000
        time.sleep(0.001)
    return time.monotonic() - began_s


def test_trap_09_a_restart_between_two_pings_leads_to_a_new_registration() -> None:
    with server() as process, engine_of(process.runtime_dir, CALM) as engine:
        engine.becomes(State.HEALTHY)
        for _ in range(3):
            before = engine.heart.membership
            process.restart()
            eventually(lambda before=before: engine.heart.membership != before, "a new membership", 20.0)
            engine.becomes(State.HEALTHY)
            membership = engine.heart.membership
            assert membership is not None
            assert membership.boot != before.boot
        assert not any("unanswered" in line for line in engine.lines)


def test_a_frozen_server_is_found_and_used_again_when_it_goes_on() -> None:
    with server() as process, engine_of(process.runtime_dir, QUICK) as engine:
        engine.becomes(State.HEALTHY)
        os.kill(process.pid, signal.SIGSTOP)
        engine.becomes(State.DEGRADED)
        engine.tells('healthy -> suspect why="ping unanswered for 1000 ms"')
        # By two unanswered pings, or, after 2 s, because the link has given its connection up.
        engine.tells("suspect -> degraded why=")
        os.kill(process.pid, signal.SIGCONT)
        engine.becomes(State.HEALTHY)


def test_a_server_that_appears_long_after_the_start_is_found() -> None:
    with short_dir() as directory, engine_of(directory / "later", HASTY) as engine:
        engine.becomes(State.DEGRADED)
        pings = engine.heart.health._seq
        eventually(lambda: engine.heart.health._seq > pings + PINGS, "pings")
        assert len(engine.lines) == 2, "an absent server is told of once"
        (directory / "later").mkdir()
        with ServerProcess(directory / "later"):
            engine.becomes(State.HEALTHY)


def test_a_drained_server_is_left_before_it_is_gone() -> None:
    with server("--drain", "10m") as process, engine_of(process.runtime_dir, QUICK) as engine:
        engine.becomes(State.HEALTHY)
        reader = Session(process.runtime_dir, "reader", PART_BYTES)
        reader.store([bytes(32)], [b"content"])
        assert reader.lookup("request", [bytes(32)])
        os.kill(process.pid, signal.SIGTERM)
        engine.becomes(State.DEGRADED)
        engine.tells('healthy -> degraded why="the server is starting or about to stop"')
        assert process.process is not None
        assert process.process.poll() is None, "it waits for the lease"
        reader.release("request")
        eventually(lambda: process.process.poll() is not None, "its end")
        process.start()
        engine.becomes(State.HEALTHY)
        reader.abandon()


def test_a_runtime_dir_that_is_removed_under_both_is_made_again() -> None:
    with server() as process, engine_of(process.runtime_dir, QUICK) as engine:
        engine.becomes(State.HEALTHY)
        before = engine.heart.membership
        shutil.rmtree(process.runtime_dir)
        eventually(lambda: engine.heart.membership != before, "a new membership", 20.0)
        engine.becomes(State.HEALTHY)


def test_a_server_that_never_comes_back_costs_a_line_and_no_more() -> None:
    with server() as process, engine_of(process.runtime_dir, HASTY) as engine:
        engine.becomes(State.HEALTHY)
        process.kill()
        shutil.rmtree(process.runtime_dir)
        engine.becomes(State.DEGRADED)
        lines, pings = len(engine.lines), engine.heart.health._seq
        eventually(lambda: engine.heart.health._seq > pings + PINGS, "pings")
        assert len(engine.lines) == lines


def test_trap_16_sessions_reaped_by_unregistering_them_are_registered_again() -> None:
    with server() as process, engine_of(process.runtime_dir, QUICK) as engine:
        engine.becomes(State.HEALTHY)
        before = engine.heart.membership
        assert before is not None
        thief = Session(process.runtime_dir, "thief", PART_BYTES)
        thief.client.ask(m.Unregister(id=thief.client.next_id(), session=before.session), m.Done)
        eventually(lambda: engine.heart.membership != before, "a new membership")
        engine.becomes(State.HEALTHY)
        engine.tells('why="the server forgot us"')
        thief.close()


Answer = Callable[[m.Request], list[bytes]]


def pong_to(request: m.Request, seq: int) -> bytes:
    return encode(m.Pong(id=request.id, boot=9, seq=seq, known=True, state="ready", progress=0, silence_ms=0))


LIES: dict[str, Answer] = {
    "nothing": lambda request: [],
    "noise": lambda request: [b"HTTP/1.1 400 Bad Request"],
    "zeros": lambda request: [bytes(10_000)],
    "too much": lambda request: [bytes(m.FRAME_BYTES_MAX + 1)],
    "the request itself": lambda request: [encode(request)],
    "another reply": lambda request: [encode(m.Done(id=request.id, boot=9))],
    "pongs to nothing": lambda request: [pong_to(request, seq) for seq in (0, 10**6, m.ID_MAX)],
    "pongs to what was long ago": lambda request: [pong_to(request, max(0, request.id - 10))],
    "pongs and no registration": lambda request: [pong_to(request, request.id)],
}


class Liar(threading.Thread):
    """Listens at the server's socket and answers each ping as it likes."""

    def __init__(self, runtime_dir: Path, answer: Answer) -> None:
        super().__init__(name="liar")
        self.pings = 0
        self._path = runtime_dir / SOCKET
        self._answer = answer
        self._ended = threading.Event()
        (runtime_dir / LOCKS).mkdir()

    def run(self) -> None:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as peer:
            peer.setsockopt(zmq.LINGER, 0)
            peer.bind(f"ipc://{self._path}")
            while not self._ended.is_set():
                if peer.poll(20):
                    client, *frames = peer.recv_multipart()
                    request = decode_request(frames[0])
                    self.pings += isinstance(request, m.Ping)
                    for frame in self._answer(request):
                        peer.send_multipart([client, frame])

    def end(self) -> None:
        self._ended.set()
        self.join()


@pytest.mark.parametrize("lie", LIES)
def test_a_liar_is_never_used_and_its_honest_successor_is(lie: str) -> None:
    with short_dir() as runtime_dir, contextlib.ExitStack() as stack:
        liar = Liar(runtime_dir, LIES[lie])
        liar.start()
        stack.callback(liar.end)
        engine = stack.enter_context(engine_of(runtime_dir, HASTY))
        eventually(lambda: liar.pings >= PINGS, "pings", 20.0)
        assert not engine.heart.usable
        assert not any("-> healthy" in line for line in engine.lines)
        liar.end()
        with ServerProcess(runtime_dir):
            engine.becomes(State.HEALTHY)


def test_a_socket_of_somebody_else_is_never_used_and_a_server_after_it_is() -> None:
    with short_dir() as runtime_dir, socket.socket(socket.AF_UNIX) as listener:
        (runtime_dir / LOCKS).mkdir()
        listener.bind(str(runtime_dir / SOCKET))
        listener.listen()
        listener.settimeout(10.0)
        with engine_of(runtime_dir, HASTY) as engine:
            for _ in range(5):
                client, _address = listener.accept()
                client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                client.close()
            assert not engine.heart.usable
            listener.close()
            with ServerProcess(runtime_dir):
                engine.becomes(State.HEALTHY)


def back_s(runtime_dir: Path, engine: Engine) -> float:
    """How long an honest server, once it answers, is not used."""
    with ServerProcess(runtime_dir):
        began_s = time.monotonic()
        engine.becomes(State.HEALTHY)
        return time.monotonic() - began_s


@pytest.mark.parametrize("backlog", [0, 128])
def test_trap_30_a_peer_that_never_accepts_delays_its_successor_by_less_than_6_s(backlog: int) -> None:
    """Connections wait in its queue, or are refused as that is full; with the usual times."""
    with short_dir() as runtime_dir, socket.socket(socket.AF_UNIX) as listener:
        (runtime_dir / LOCKS).mkdir()
        listener.bind(str(runtime_dir / SOCKET))
        listener.listen(backlog)
        with engine_of(runtime_dir, Timing()) as engine:
            engine.becomes(State.DEGRADED)
            eventually(lambda: engine.heart.health._seq > 3, "pings")
            listener.close()
            assert back_s(runtime_dir, engine) < BACK_S


def test_trap_30_a_peer_that_accepts_and_stays_silent_delays_its_successor_by_less_than_6_s() -> None:
    with short_dir() as runtime_dir, contextlib.ExitStack() as stack:
        (runtime_dir / LOCKS).mkdir()
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(runtime_dir / SOCKET))
        listener.listen()
        listener.settimeout(10.0)
        engine = stack.enter_context(engine_of(runtime_dir, Timing()))
        held = [listener.accept()[0]]
        engine.becomes(State.DEGRADED)
        eventually(lambda: engine.heart.health._seq > 3, "pings")
        stack.callback(lambda: [each.close() for each in held])
        (runtime_dir / SOCKET).unlink()  # it lives on, and keeps the connection
        assert back_s(runtime_dir, engine) < BACK_S


def test_trap_30_a_peer_that_falls_silent_delays_its_successor_by_less_than_6_s() -> None:
    """It speaks ZeroMQ, and has the engine's messages."""
    with short_dir() as runtime_dir, contextlib.ExitStack() as stack:
        liar = Liar(runtime_dir, LIES["nothing"])
        liar.start()
        stack.callback(liar.end)
        engine = stack.enter_context(engine_of(runtime_dir, Timing()))
        engine.becomes(State.DEGRADED)
        eventually(lambda: liar.pings > 3, "pings")
        (runtime_dir / SOCKET).unlink()
        assert back_s(runtime_dir, engine) < BACK_S
