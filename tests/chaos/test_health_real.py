"""What each endpoint says while a real server is stuck, stopped, starved, drained or short of memory."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from bench.jumpy_clock import JumpyClock
from cache_server.protocol import messages as m
from cache_server.session import Kind, Session
from cache_server.vitals import TURN_MS
from health.probed import LATE_MS, QUICK, SLACK_S, STALL_MS, Probed, probed
from processes import ServerProcess, eventually, short_dir
from tools import lacking, tool

pytestmark = pytest.mark.chaos

DEEP_S = 2 * 1 + 1  # with `QUICK`, as the bounds below: docs/health.md has the formulas
UNPROVEN_S = 3 + 2 * (1 + 1.9) + 0.2
CHUNK = 4096
HASHES = [bytes([number]) * 32 for number in range(1, 5)]
CONTENTS = [bytes([number]) * CHUNK for number in range(1, 5)]


def test_a_stuck_loop_is_told_in_time_by_a_side_that_answers_on() -> None:
    with probed(*QUICK) as server:
        began_s = time.monotonic()
        server.fault("loop", "12")
        said = server.becomes("/ready", 503)
        assert said["code"] == "late"
        assert said["live"]
        said = server.becomes("/live", 503)
        found_s = time.monotonic() - began_s
        assert STALL_MS / 1_000 <= found_s <= STALL_MS / 1_000 + SLACK_S
        assert said["code"] == "stalled"
        assert said["reason"].startswith("loop: has not moved for ")
        checked = server.check("live")
        assert checked.returncode == 1
        assert "the main loop has not turned for" in checked.stderr
        eventually(lambda: server.logged("stacks of all threads"), "a stack dump")
        assert "faults.py" in server.process.log.read_text(), "the dump shows where it stands"
        server.becomes("/live", 200, 60)
        server.becomes("/ready", 200, 60)
        assert server.check("live").returncode == 0
        assert server.transitions == [("starting", "ready"), ("ready", "failing"), ("failing", "ready")]
        assert server.logged("stacks of all threads") == 1
        assert server.logged('health: ready -> failing why="late: loop: ') == 1
        assert server.logged("health: failing -> ready why=") == 1
        assert server.logged("health: ") == 4, "three transitions and a dump"
        counted = {name: count for name, count in server.metrics().items() if "transitions_total" in name}
        assert counted == {
            'cache_server_transitions_total{from="starting",reason="ok",to="ready"}': 1,
            'cache_server_transitions_total{from="ready",reason="late",to="failing"}': 1,
            'cache_server_transitions_total{from="failing",reason="ok",to="ready"}': 1,
        }


def test_a_stopped_process_is_told_by_the_exec_probe_and_blames_nobody_afterwards() -> None:
    with probed(*QUICK) as server:
        assert server.check("live").returncode == 0
        os.kill(server.process.pid, signal.SIGSTOP)
        began_s = time.monotonic()
        eventually(lambda: server.check("ready").returncode == 1, "not ready", 60)
        assert LATE_MS / 1_000 <= time.monotonic() - began_s <= (LATE_MS + TURN_MS) / 1_000 + SLACK_S
        eventually(lambda: server.check("live").returncode == 1, "not live", 60)
        assert STALL_MS / 1_000 <= time.monotonic() - began_s <= (STALL_MS + TURN_MS) / 1_000 + SLACK_S
        assert "the process stands still" in server.check("live").stderr
        os.kill(server.process.pid, signal.SIGCONT)
        assert server.get("/live")[0] == 200
        eventually(lambda: server.check("live").returncode == 0, "live again", 60)
        server.becomes("/ready", 200)
        dead = [
            event
            for event in server.get("/health/events")[1]["events"]
            if event["code"] in ("stalled", "dead")
        ]
        assert dead == []
        assert "stacks of all threads" not in server.process.log.read_text()


def test_without_a_server_the_exec_probe_says_so() -> None:
    with probed() as server:
        server.process.kill()
        for probe in ("live", "ready", "deep"):
            checked = server.check(probe)
            assert checked.returncode == 1
            assert "no server runs on" in checked.stderr
    command = [sys.executable, "-m", "cache_server", "check", "--live", "--late-after", "nan"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 2


def test_trap_14_a_dead_http_thread_is_told_by_the_exec_probe() -> None:
    with probed(*QUICK) as server:
        server.heeded("http", "die")
        died_s = time.monotonic()
        eventually(lambda: server.check("live").returncode == 1, "not live", 60)
        assert time.monotonic() - died_s <= TURN_MS / 1_000 + SLACK_S
        assert "http: its thread is dead" in server.check("live").stderr
        session = Session(server.process.runtime_dir, "engine", CHUNK)
        session.store(HASHES, CONTENTS)
        assert session.load(HASHES) == CONTENTS
        session.close()


def test_the_exec_probe_works_while_the_http_thread_starves() -> None:
    with probed(*QUICK) as server:
        server.heeded("http", "3600")
        with pytest.raises(TimeoutError):
            server.get("/live", 0.5)
        for probe in ("live", "ready", "deep"):
            checked = server.check(probe)
            assert checked.returncode == 0, checked.stderr
        with pytest.raises(TimeoutError):
            server.get("/live", 0.5)


def test_trap_14_a_dead_watch_is_told_by_the_http_side() -> None:
    with probed(*QUICK) as server:
        server.heeded("watch", "die")
        died_s = time.monotonic()
        said = server.becomes("/live", 503)
        assert time.monotonic() - died_s <= SLACK_S
        assert said["reason"] == "watch: its thread is dead"
        eventually(
            lambda: server.check("live").returncode == 1, "its page grows old", STALL_MS / 1_000 + SLACK_S
        )


def test_trap_14_a_dead_canary_degrades_and_then_takes_readiness_never_liveness() -> None:
    with probed(*QUICK) as server:
        server.heeded("canary", "die")
        died_s = time.monotonic()
        eventually(lambda: server.get("/health")[1]["status"] == "degraded", "degraded")
        assert time.monotonic() - died_s <= TURN_MS / 1_000 + SLACK_S
        assert server.get("/health")[1]["reason"] == "canary: its thread is dead"
        asked_s = time.monotonic()
        code, said = server.get("/health?deep=1", 60)
        assert (code, said["reason"]) == (503, "no outcome within the deadline")
        assert time.monotonic() - asked_s <= DEEP_S + SLACK_S
        assert server.becomes("/ready", 503)["code"] == "unproven"
        assert time.monotonic() - died_s <= UNPROVEN_S + SLACK_S
        assert server.get("/live")[0] == 200


def test_a_run_that_hangs_is_told_to_who_asked_within_the_deadline() -> None:
    with probed(*QUICK) as server:
        server.fault("canary_job", "3600")
        asked_s = time.monotonic()
        code, said = server.get("/health?deep=1", 60)
        assert time.monotonic() - asked_s <= DEEP_S + SLACK_S
        assert (code, said["code"]) == (503, "canary")
        assert said["reason"] == "failed at connect: no outcome within 1000 ms"
        code, said = server.get("/health?deep=1", 60)
        assert (code, said["reason"]) == (503, "no outcome within the deadline"), "its thread is still away"
        assert server.get("/live")[0] == 200


def test_a_path_that_breaks_is_told_with_its_stage_and_so_is_its_mending() -> None:
    with probed(*QUICK) as server:
        locks = server.process.runtime_dir / "locks"
        locks.rename(locks.with_name("elsewhere"))  # no process can prove that it lives
        said = server.becomes("/ready", 503)
        assert said["code"] == "canary"
        assert said["reason"].startswith("failed at register, 2 in a row: ")
        assert server.get("/live")[0] == 200
        assert server.check("live").returncode == 0
        assert server.check("ready").returncode == 1
        code, said = server.get("/health?deep=1", 60)
        assert (code, said["canary"]["last"]["stage"]) == (503, "register")
        locks.with_name("elsewhere").rename(locks)
        server.becomes("/ready", 200)
        assert server.transitions == [("starting", "ready"), ("ready", "failing"), ("failing", "ready")]


def test_long_work_under_a_lease_is_unready_and_live() -> None:
    with probed(*QUICK) as server:
        server.heeded("loop", "busy 8")
        end_s = time.monotonic() + 7
        server.becomes("/ready", 503)
        checks = 0
        while time.monotonic() < end_s:
            assert server.get("/live")[0] == 200
            code, said = server.get("/ready")
            assert (code, said["code"], said["reason"]) == (503, "busy", "loop: busy with 'fault'")
            if checks < 3:
                assert server.check("live").returncode == 0
                assert server.check("ready").returncode == 1
                checks += 1
        assert checks == 3
        server.becomes("/ready", 200)
        assert server.transitions == [("starting", "ready"), ("ready", "failing"), ("failing", "ready")]
        assert server.logged("stacks of all threads") == 0


def test_while_a_call_keeps_the_interpreter_the_pages_wait_and_the_exec_probe_tells() -> None:
    """No Python thread runs then: it is as if the process were stopped, and is judged so."""
    with probed(*QUICK) as server:
        server.heeded("loop", "gil 8")
        began_s = time.monotonic()
        with pytest.raises(TimeoutError):
            server.get("/live", 0.5)
        eventually(lambda: server.check("ready").returncode == 1, "not ready")
        eventually(lambda: server.check("live").returncode == 1, "not live")
        assert "the process stands still" in server.check("live").stderr
        assert time.monotonic() - began_s < 8, "all of that was told meanwhile"
        assert server.get("/live", 20)[0] == 200, "who asked then is answered afterwards"
        server.becomes("/ready", 200)
        assert server.check("live").returncode == 0
        assert server.logged("stacks of all threads") == 0, "who judges slept as well"


def test_a_drain_turns_readiness_red_first_and_liveness_never() -> None:
    with probed("--drain", "20s") as server:
        session = Session(server.process.runtime_dir, "engine", CHUNK)
        session.store(HASHES, CONTENTS)
        session.lookup("held", HASHES)
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.becomes("/ready", 503)["code"] == "draining"
        for _ in range(10):
            assert server.get("/live")[0] == 200
        session.release("held")
        with contextlib.suppress(OSError):  # until its end
            while True:
                assert server.get("/live")[0] == 200
        assert server.process.process.wait(20) == 0
        assert 'ready -> draining why="draining' in server.process.log.read_text()
        assert "draining -> stopped" in server.process.log.read_text()
        session.abandon()


def test_a_pause_takes_readiness_and_keeps_what_is_there() -> None:
    with probed("--pause-limit", "1h") as server:
        session = Session(server.process.runtime_dir, "engine", CHUNK)
        session.store(HASHES, CONTENTS)
        server.tell("pause")
        assert server.becomes("/ready", 503)["code"] == "paused"
        assert server.get("/live")[0] == 200
        eventually(lambda: session.ping().state == "draining", "engines are told")
        server.tell("resume")
        server.becomes("/ready", 200)
        eventually(lambda: session.ping().state == "ready", "engines are told")
        assert session.load(HASHES) == CONTENTS
        session.close()


def test_a_pause_ends_by_itself() -> None:
    with probed("--pause-limit", "2s") as server:
        server.tell("pause")
        server.becomes("/ready", 503)
        paused_s = time.monotonic()
        server.becomes("/ready", 200)
        assert time.monotonic() - paused_s <= 2 + SLACK_S
        paused, resumed = server.get("/health/events")[1]["events"][1::-1]
        assert (paused["to"], resumed["from"], resumed["to"]) == ("paused", "paused", "ready")
        assert 1.5 <= resumed["lasted_s"] <= 2 + SLACK_S


def test_a_hold_keeps_readiness_red_until_its_owner_or_its_time_ends_it() -> None:
    with probed() as server:
        session = Session(server.process.runtime_dir, "engine", CHUNK)
        server.tell("hold", "--owner", "upgrade", "--ttl", "1m", "--reason", "the image is being replaced")
        said = server.becomes("/ready", 503)
        assert (said["code"], said["reason"]) == ("held", "by upgrade: the image is being replaced")
        assert server.get("/live")[0] == 200
        (row,) = server.get("/health")[1]["holds"]
        assert (row["owner"], row["reason"]) == ("upgrade", "the image is being replaced")
        assert 0 < row["left_s"] <= 60
        assert server.check("ready").returncode == 1
        session.store(HASHES, CONTENTS)
        assert session.load(HASHES) == CONTENTS, "it serves on"
        server.tell("unhold", "--owner", "upgrade")
        server.becomes("/ready", 200)
        with pytest.raises(subprocess.CalledProcessError):
            server.tell("unhold", "--owner", "upgrade")
        server.tell("hold", "--owner", "short", "--ttl", "2s", "--reason", "ends by itself")
        server.becomes("/ready", 503)
        server.becomes("/ready", 200, 2 + SLACK_S)
        session.close()


@pytest.mark.parametrize(("status", "code", "exit_code"), [("ready", 200, 0), ("unready", 503, 1)])
def test_what_starting_counts_as_is_told_by_the_exec_probe_too(
    status: str, code: int, exit_code: int
) -> None:
    with short_dir() as directory:
        (directory / "fault.start").write_text("6")
        with probed("--starting-status", status, directory=directory, wait=False) as server:
            eventually((directory / "beat").exists, "its page", 20)
            eventually(lambda: server.check("ready").returncode == exit_code, f"exit {exit_code}", 5)
            assert server.get("/startup")[0] == 503, "the start is not over"
            assert server.get("/ready")[0] == code


def test_the_listener_is_up_before_the_server() -> None:
    with short_dir() as directory:
        (directory / "fault.start").write_text("5")
        with probed(directory=directory, wait=False) as server:

            def up() -> bool:
                try:
                    return server.get("/live")[0] == 200
                except OSError:
                    return False

            eventually(up, "live", 20)
            assert server.get("/startup")[0] == 503
            code, said = server.get("/ready")
            assert (code, said["state"], said["boot"]) == (503, "starting", None)
            assert not server.process.answers()
            server.becomes("/startup", 200)
            server.becomes("/ready", 200)


@pytest.fixture
def small_tmpfs() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="cst-"))
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(path)], capture_output=True, check=False
    )
    if mounted.returncode:
        path.rmdir()
        lacking(f"can't mount here: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)
    shutil.rmtree(path, ignore_errors=True)


def test_a_full_memory_file_system_takes_readiness_until_there_is_room(small_tmpfs: Path) -> None:
    directory = small_tmpfs / "cs"
    directory.mkdir()
    (directory / "fault.populate").write_text("6")
    with probed(*QUICK, directory=directory, wait=False) as server:
        eventually(
            lambda: (directory / "beat").exists() and not (directory / "fault.populate").exists(),
            "started",
            30,
        )
        filler = small_tmpfs / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        eventually(lambda: server.get("/ready")[1]["code"] == "memory", "no memory", 60)
        code, said = server.get("/health")
        assert code == 503
        assert [(row["tier"], row["state"]) for row in said["tiers"]] == [("memory", "failed")]
        assert "No space left" in said["reason"]
        assert server.get("/live")[0] == 200
        filler.unlink()
        server.becomes("/ready", 200, 60)


def test_trap_28_a_wall_clock_that_jumps_an_hour_either_way_changes_nothing(tmp_path: Path) -> None:
    clock = JumpyClock(tmp_path, tool("cc", "gcc"))
    with probed(*QUICK, **clock.environment) as server:
        session = Session(server.process.runtime_dir, "engine", CHUNK)
        session.store(HASHES, CONTENTS)
        for jump_s in (0, 3_600, -3_600):
            clock.jump_to(jump_s)
            end_s = time.monotonic() + 1.5
            while time.monotonic() < end_s:
                assert server.get("/ready")[0] == 200
                session.ping()
            witness = Session(
                server.process.runtime_dir, f"witness{jump_s}", CHUNK, kind=Kind(0, (m.CANARY,))
            )
            witness.abandon()  # a canary's end is logged, and no trouble
            eventually(lambda at=jump_s: server.logged(f"engine: gone: witness{at} "), "a stamp")
        assert server.transitions == [("starting", "ready")]
        assert session.ping().known
        session.close()
        now, later, earlier = (stamp_of(server, f"witness{jump_s} ") for jump_s in (0, 3_600, -3_600))
        assert 3_600 <= (later - now).total_seconds() <= 3_700, "the clock that it writes by has jumped"
        assert 3_500 <= (now - earlier).total_seconds() <= 3_600


def stamp_of(server: Probed, words: str) -> datetime:
    (line,) = (line for line in server.process.log.read_text().splitlines() if words in line)
    return datetime.strptime(line.partition(",")[0], "%Y-%m-%d %H:%M:%S")  # noqa: DTZ007  all are local


def test_trap_12_eight_concurrent_starts_are_one_server() -> None:
    with short_dir() as directory:
        processes = [ServerProcess(directory) for _ in range(8)]
        try:
            for process in processes:
                process.launch()
            eventually(lambda: sum(each.process.poll() is None for each in processes) == 1, "one is left", 60)
            eventually(lambda: processes[0].answers(1_000), "it answers", 30)
            assert sum(each.process.poll() == 1 for each in processes) == 7
            assert "already runs on it" in processes[0].log.read_text()
        finally:
            for process in processes:
                process.kill()
            processes[0].log.unlink(missing_ok=True)


def test_pages_keep_their_manners() -> None:
    with probed() as server:
        host, port = server.address.split(":")
        for sent, expected in (
            (b"GET /live HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK"),
            (b"HEAD /live HTTP/1.0\r\n\r\n", b"HTTP/1.1 200 OK"),
            (b"POST /live HTTP/1.1\r\nContent-Length: 0\r\n\r\n", b"HTTP/1.1 405"),
            (b"GET /nothing HTTP/1.1\r\n\r\n", b"HTTP/1.1 404"),
            (b"nonsense\r\n\r\n", b"HTTP/1.1 400"),
            (b"\x00\xff\r\n\r\n", b"HTTP/1.1 400"),
            (b"GET /" + b"x" * 20_000, b"HTTP/1.1 431"),
        ):
            with socket.create_connection((host, int(port)), timeout=20) as client:
                client.sendall(sent)
                answer = b""
                with contextlib.suppress(ConnectionResetError):
                    while got := client.recv(65_536):
                        answer += got
            assert answer.startswith(expected), (sent[:40], answer[:80])
            assert b"Cache-Control: no-store\r\n" in answer
            assert (answer.partition(b"\r\n\r\n")[2] == b"") == sent.startswith(b"HEAD")
        slow = [socket.create_connection((host, int(port)), timeout=20) for _ in range(600)]
        slow[0].sendall(b"GET /live HT")
        began_s = time.monotonic()
        assert server.get("/live", 30)[0] == 200
        assert time.monotonic() - began_s < 20
        for client in slow:
            client.close()
        assert server.check("deep").stdout.startswith("deep: ok (")
