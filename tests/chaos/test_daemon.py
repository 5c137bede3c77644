"""The daemon as an operator meets it: real processes, real signals, real files."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_server import control
from cache_server.client import Client, RefusedError
from cache_server.config import load
from cache_server.daemon import ServiceManager
from cache_server.faults import SWITCH
from cache_server.protocol import messages as m
from cache_server.runtime import running_server
from cache_server.session import Session
from processes import ServerProcess, eventually, server, short_dir
from tools import lacking

pytestmark = pytest.mark.chaos

CHUNK = 4096
HASHES = [bytes([number]) * 32 for number in range(1, 9)]
CONTENTS = [bytes([number]) * CHUNK for number in range(1, 9)]


def cache_server(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cache_server", *arguments],
        text=True, capture_output=True, timeout=60, check=False, env={**os.environ, **environment},
    )  # fmt: skip


def stored(runtime_dir: Path) -> Session:
    session = Session(runtime_dir, "engine", CHUNK)
    session.store(HASHES, CONTENTS)
    return session


def test_a_whole_life_in_the_background(tmp_path: Path) -> None:
    with short_dir() as directory:
        common = ("--dir", str(directory), "--capacity", "64MiB", "--http", "off")
        log = tmp_path / "server.log"
        started = cache_server("run", "--daemon", "--log-file", str(log), *common)
        assert started.returncode == 0, started.stderr
        serving = running_server(directory)
        assert serving is not None
        pid = serving.pid
        assert f"pid {pid}" in started.stdout
        assert cache_server("ping", *common).stdout.startswith("ready: boot ")
        second = cache_server("run", *common)
        assert second.returncode == 1
        assert f"(pid {pid}) already runs" in second.stderr

        log.rename(tmp_path / "rotated.log")
        os.kill(pid, signal.SIGHUP)
        eventually(log.exists, "SIGHUP opens the log anew")

        eventually(lambda: not status(common)["arena"]["unpopulated_bytes"], "populated")
        session = stored(directory)
        workers = json.loads(cache_server("workers", "--json", *common).stdout)
        assert [(row["engine"], row["state"], row["pid"]) for row in workers] == [
            ("engine", "ready", os.getpid())
        ]
        assert "engine" in cache_server("workers", *common).stdout
        assert "8 stored" in cache_server("status", *common).stdout
        assert "per second" in cache_server("top", *common).stdout
        assert cache_server("clear", *common).stdout == "cleared 8 chunks\n"
        assert session.load(HASHES) == []
        session.store(HASHES, CONTENTS)
        session.close()

        assert cache_server("stop", *common).stdout == "stopped\n"
        assert "draining -> stopped" in log.read_text()
        assert sorted(path.name for path in directory.iterdir()) == ["arena", "locks", "token"]
        assert cache_server("stop", *common).stdout.startswith("no server runs on")

        assert cache_server("run", "--daemon", *common).returncode == 0
        assert status(common)["chunks"]["restored"] == 8
        purged = cache_server("stop", "--purge", *common).stdout
        assert purged == f"stopped\nremoved {directory}/arena, {directory}\n"
        assert not directory.exists()


def test_a_stop_waits_for_as_long_as_the_server_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own `drain` may be another one."""
    monkeypatch.setattr(control, "PATIENCE_S", 3.0)
    with server("--drain", "5s") as process:
        session = stored(process.runtime_dir)
        assert session.lookup("never released", HASHES)
        began_s = time.monotonic()
        assert control.stop(load({"dir": str(process.runtime_dir), "drain": "0s"}, None))
        assert time.monotonic() - began_s > 4.0
        session.abandon()


def test_who_stops_a_stopped_process_is_told_how_it_goes_on() -> None:
    with server() as process:
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(
            control.ControlError, match=f"is stopped: `kill -CONT {process.pid}` lets it go on"
        ):
            control.stop(load({"dir": str(process.runtime_dir)}, None))
        os.kill(process.pid, signal.SIGCONT)


def test_what_a_start_is_refused_for_is_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("of four years")
    with short_dir() as directory:
        for options in (
            ("--arena", str(tmp_path / "thesis"), "--dir", str(directory)),
            ("--dir", str(tmp_path)),
        ):
            started = cache_server("run", "--capacity", "16MiB", "--http", "off", *options)
            assert started.returncode == 1
            assert "is kept" in started.stderr or "that are no cache server's (thesis)" in started.stderr
            purged = cache_server("stop", "--purge", *options)
            assert purged.returncode == 1
            assert "not removed" in purged.stderr or "nothing was removed" in purged.stderr
    assert (tmp_path / "thesis").read_text() == "of four years"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]


def status(common: tuple[str, ...]) -> dict:
    return json.loads(cache_server("status", "--json", *common).stdout)


def test_options_come_from_flag_environment_and_file_and_nonsense_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "server.toml"
    config.write_text('capacity = "2GiB"\nlease = "40s"\ndrain = "1s"\n')
    shown = cache_server("config", "--config", str(config), "--drain", "3s", CACHE_SERVER_LEASE="50s").stdout
    lines = {line.split()[0]: line.split()[1:] for line in shown.splitlines()}
    assert lines["capacity"] == ["2GiB", str(config)]
    assert lines["lease"] == ["50s", "CACHE_SERVER_LEASE"]
    assert lines["drain"] == ["3s", "--drain"]
    assert lines["silent_after"] == ["5s", "default"]
    refused = cache_server("run", "--capacity", "8GB", "--dir", str(tmp_path))
    assert refused.returncode == 2
    assert "capacity = '8GB' (from --capacity): expected a number with a unit" in refused.stderr


def test_drain_waits_for_leases_and_refuses_new_ones() -> None:
    with server("--drain", "20s") as process:
        session = stored(process.runtime_dir)
        assert len(session.lookup("slow", HASHES)) == 8
        os.kill(process.pid, signal.SIGTERM)
        eventually(lambda: session.ping().state == "draining", "draining")
        with pytest.raises(RefusedError, match="DRAINING"):
            session.lookup("late", HASHES)
        with pytest.raises(RefusedError, match="DRAINING"):
            session.reserve(1)
        assert process.process.poll() is None
        assert session.release("slow") == 1
        assert process.process.wait(5) == 0
        session.abandon()


def test_drain_has_a_deadline_and_a_second_signal_ends_it_at_once() -> None:
    for drain, signals in (("200ms", 1), ("10m", 2)):
        with server("--drain", drain) as process:
            session = stored(process.runtime_dir)
            session.lookup("for ever", HASHES)
            for _ in range(signals):
                os.kill(process.pid, signal.SIGTERM)
                time.sleep(0.05)
            assert process.process.wait(5) == 0
            session.abandon()


def test_a_removed_arena_is_noticed_and_replaced() -> None:
    with server() as process:
        session = stored(process.runtime_dir)
        boot = session.boot
        (process.runtime_dir / "arena").unlink()
        eventually(lambda: session.ping().boot != boot, "another boot", 20.0)
        assert not session.ping().known
        process.populated()
        session.register()
        assert session.load(HASHES) == []
        session.store(HASHES, CONTENTS)
        assert session.load(HASHES) == CONTENTS
        session.close()


def test_a_daemon_whose_dir_is_removed_with_its_log_in_it_begins_both_anew() -> None:
    with short_dir() as parent:
        directory, log = parent / "run", parent / "run" / "server.log"
        common = ("--dir", str(directory), "--capacity", "16MiB", "--http", "off")
        pid = int(cache_server("run", "--daemon", *common).stdout.rpartition(" ")[2])
        try:
            shutil.rmtree(directory)
            eventually(log.exists, "begun anew", 20.0)
            eventually(lambda: "-> ready" in log.read_text(), "serves anew")
            assert "begins anew: arena or socket was removed under it" in log.read_text()
            assert cache_server("ping", *common).stdout.startswith("ready: boot ")
        finally:
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def beginning(directory: Path) -> Iterator[ServerProcess]:
    """A server that is held up for a minute before it takes the arena over."""
    process = ServerProcess(directory, environment={SWITCH: "1"})
    delayed = directory / "fault.start"
    delayed.write_text("60")
    process.launch()
    try:
        eventually(lambda: not delayed.exists(), "begun")
        yield process
    finally:
        process.kill()
        process.log.unlink()


def test_a_server_that_does_not_serve_yet_is_stopped_at_once() -> None:
    for told in (signal.SIGTERM, signal.SIGINT):
        with short_dir() as directory, beginning(directory) as process:
            os.kill(process.pid, told)
            assert process.process.wait(5) == 0
            assert not (directory / "server.pid").exists()
            assert "told to stop before it served" in process.log.read_text()


def test_a_server_that_begins_anew_holds_no_arena_and_is_stopped_at_once() -> None:
    with short_dir() as directory, ServerProcess(directory, environment={SWITCH: "1"}) as process:
        delayed = directory / "fault.start"
        delayed.write_text("60")
        (directory / "server.sock").unlink()
        eventually(lambda: not delayed.exists(), "begun anew")
        maps = Path(f"/proc/{process.pid}/maps").read_text()
        assert f"{directory}/arena" not in maps, "the old one's memory would be held beside the new one's"
        os.kill(process.pid, signal.SIGTERM)
        assert process.process.wait(5) == 0


def test_a_server_that_begins_anew_is_still_paused() -> None:
    with server() as process:
        os.kill(process.pid, signal.SIGUSR1)
        eventually(lambda: process.status().state == "paused", "paused")
        (process.runtime_dir / "arena").unlink()
        eventually(lambda: "begins anew" in process.log.read_text(), "noticed")
        eventually(process.answers, "begun anew", 20.0)
        eventually(lambda: process.status().state == "paused", "still paused")
        os.kill(process.pid, signal.SIGUSR2)
        eventually(lambda: process.status().state == "ready", "resumed")


def test_a_new_capacity_starts_empty_and_says_so() -> None:
    with server() as process:
        stored(process.runtime_dir).close()
        process.kill()
        process.options += ["--capacity", "128MiB"]
        process.start()
        assert process.status().chunks.stored == 0
        assert "starts empty, the old file can't be taken over" in process.log.read_text()


def test_more_memory_than_there_is_is_refused_and_the_old_arena_survives() -> None:
    with server() as process:
        stored(process.runtime_dir).close()
        process.kill()
        refused = cache_server(
            "run", "--dir", str(process.runtime_dir), "--capacity", "60TiB", "--http", "off"
        )
        assert refused.returncode == 1
        assert "MiB more are to be filled" in refused.stderr
        assert "lower --capacity" in refused.stderr
        process.start()
        assert process.status().chunks.restored == 8


def test_a_taken_http_port_is_refused() -> None:
    with short_dir() as directory, socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = cache_server("run", "--dir", str(directory), "--capacity", "16MiB", "--http", address)
        assert refused.returncode == 1
        assert "choose another --http, or off" in refused.stderr
        background = cache_server(
            "run", "--daemon", "--dir", str(directory), "--capacity", "16MiB", "--http", address
        )
        assert background.returncode == 1
        assert "choose another --http, or off" in background.stderr
        assert not (directory / "arena").exists()


def test_http_serves_metrics_and_status() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with server("--http", address) as process:
        session = stored(process.runtime_dir)
        session.load(HASHES)

        def metric(name: str) -> float:
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=5) as page:
                lines = page.read().decode().splitlines()
            return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

        eventually(lambda: metric("cache_server_stored_chunks_total") == 8, "counted")
        eventually(lambda: metric("cache_server_chunks_found_total") == 8, "counted")
        eventually(lambda: metric('cache_server_workers{state="ready"}') == 1, "counted")
        assert metric('cache_server_arena_bytes{use="committed"}') == 8 * CHUNK
        assert metric('cache_server_request_seconds_count{op="lookup"}') >= 1
        with urllib.request.urlopen(f"http://{address}/status", timeout=5) as page:
            assert page.headers["Content-Type"] == "application/json"
            assert page.headers["Cache-Control"] == "no-store"
            assert json.load(page)["chunks"]["stored"] == 8
        request = urllib.request.Request(f"http://{address}/status", method="HEAD")
        with urllib.request.urlopen(request, timeout=5) as page:
            assert page.status == 200
            assert page.read() == b""
        with pytest.raises(urllib.error.HTTPError, match="404") as missing:
            urllib.request.urlopen(f"http://{address}/nothing", timeout=5)
        missing.value.close()
        session.close()


class Manager:
    """As systemd listens."""

    def __init__(self, directory: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(directory / "notify"))
        self.environment = {
            "NOTIFY_SOCKET": str(directory / "notify"),
            "WATCHDOG_USEC": "1000000",
            SWITCH: "1",
        }

    def __enter__(self) -> "Manager":
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def hears(self, within_s: float = 20.0) -> bytes:
        self.socket.settimeout(within_s)
        return self.socket.recv(4096)

    def hears_ready(self) -> bytes:
        assert self.hears() == b"EXTEND_TIMEOUT_USEC=63000000", "of its own capacity, and before all else"
        return self.hears()

    def longest_silence_s(self, for_s: float) -> float:
        """Between two words of life, and after the last one."""
        now_s = heard_s = time.monotonic()
        end_s, longest_s = now_s + for_s, 0.0
        while now_s < end_s:
            with contextlib.suppress(TimeoutError):
                assert self.hears(end_s - now_s) == b"WATCHDOG=1"
            now_s = time.monotonic()
            longest_s, heard_s = max(longest_s, now_s - heard_s), now_s
        return longest_s


def fault(runtime_dir: Path, order: str) -> None:
    (runtime_dir / "order").write_text(order)
    (runtime_dir / "order").rename(runtime_dir / "fault.loop")
    eventually(lambda: not (runtime_dir / "fault.loop").exists(), "heeded")


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    with (
        short_dir() as directory,
        Manager(tmp_path) as manager,
        ServerProcess(directory, "--stall-after", "7s", environment=manager.environment) as process,
    ):
        said = manager.hears_ready().decode().splitlines()
        assert said[:2] == ["READY=1", f"MAINPID={process.pid}"]
        assert said[3:] == ["WATCHDOG_USEC=7200000"], "of its own options, whatever the unit file has"
        assert manager.hears() == b"WATCHDOG=1"
        os.kill(process.pid, signal.SIGTERM)
        while (last := manager.hears()) == b"WATCHDOG=1":
            pass
        assert last == b"STOPPING=1"
        assert process.process.wait(5) == 0


def test_the_watchdog_is_fed_through_work_that_is_legal_and_longer_than_its_time(tmp_path: Path) -> None:
    with (
        short_dir() as directory,
        Manager(tmp_path) as manager,
        ServerProcess(directory, environment=manager.environment) as process,
    ):
        assert b"WATCHDOG_USEC=10200000" in manager.hears_ready()
        fault(process.runtime_dir, "busy 15")
        assert manager.longest_silence_s(15) < 5, "systemd would end it after 10.2 s"
        assert process.answers(20_000)


def test_the_watchdog_is_left_alone_by_a_loop_that_stands_still(tmp_path: Path) -> None:
    quick = ("--late-after", "500ms", "--stall-after", "2s")
    with (
        short_dir() as directory,
        Manager(tmp_path) as manager,
        ServerProcess(directory, *quick, environment=manager.environment) as process,
    ):
        assert b"WATCHDOG_USEC=2200000" in manager.hears_ready()
        fault(process.runtime_dir, "8")
        assert manager.longest_silence_s(8) > 2.2, "systemd ends it"


def test_the_watchdog_is_fed_while_the_server_begins_anew(tmp_path: Path) -> None:
    with (
        short_dir() as directory,
        Manager(tmp_path) as manager,
        ServerProcess(directory, environment=manager.environment) as process,
    ):
        assert manager.hears_ready().startswith(b"READY=1")
        (directory / "fault.start").write_text("6")
        (directory / "server.sock").unlink()  # so it begins anew, and that takes long
        eventually(lambda: not (directory / "fault.start").exists(), "begun anew")
        assert manager.longest_silence_s(5) < 3
        while (said := manager.hears()) == b"WATCHDOG=1":
            pass
        assert said.startswith(b"READY=1"), "not that it stops: systemd would wait for its end"
        assert process.answers(20_000)


def test_a_service_manager_that_does_not_listen_delays_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Manager(tmp_path) as manager:
        for name, value in manager.environment.items():
            monkeypatch.setenv(name, value)
        notify = ServiceManager(1_000)
        notify.ready("serving")
        began_s = time.monotonic()
        for _ in range(1_000):
            notify.alive()
        assert time.monotonic() - began_s < 5


def test_files_are_for_their_user_alone() -> None:
    with server() as process:
        modes = {path.name: path.stat().st_mode & 0o777 for path in process.runtime_dir.iterdir()}
        assert process.runtime_dir.stat().st_mode & 0o777 == 0o700
        assert modes == {
            "arena": 0o600,
            "beat": 0o600,
            "locks": 0o700,
            "server.pid": 0o600,
            "server.sock": 0o600,
            "token": 0o600,
        }


def test_a_group_may_be_let_in() -> None:
    with server("--group", "daemon") as process:
        modes = {path.name: path.stat().st_mode & 0o7777 for path in process.runtime_dir.iterdir()}
        assert process.runtime_dir.stat().st_mode & 0o7777 == 0o2770
        assert modes == {
            "arena": 0o660,
            "beat": 0o660,
            "locks": 0o2770,
            "server.pid": 0o660,
            "server.sock": 0o660,
            "token": 0o600,
        }


def test_clear_wants_the_token() -> None:
    with server() as process, Client(process.runtime_dir) as client:
        with pytest.raises(RefusedError, match="DENIED"):
            client.ask(m.Clear(id=1, token="guess"), m.Done)
        with pytest.raises(RefusedError, match="DENIED"):
            client.ask(m.Clear(id=2), m.Done)


@pytest.fixture
def huge_pages(tmp_path: Path):
    """A mount of 2 MiB pages, 48 of them."""
    pool = Path("/proc/sys/vm/nr_hugepages")
    mounted = subprocess.run(
        ["mount", "-t", "hugetlbfs", "none", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        lacking(f"can't mount hugetlbfs here: {mounted.stderr.decode().strip()}")
    before = pool.read_text()
    pool.write_text("48")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)
    pool.write_text(before)


def test_the_arena_may_lie_on_huge_pages(huge_pages: Path) -> None:
    with short_dir() as directory, ServerProcess(directory, "--arena", str(huge_pages / "arena")) as process:
        process.populated()
        session = stored(directory)
        assert session.load(HASHES) == CONTENTS
        process.restart()
        session.register()
        assert session.load(HASHES) == CONTENTS
        session.close()
        process.kill()
        too_much = cache_server(
            "run",
            "--dir",
            str(directory),
            "--capacity",
            "1GiB",
            "--arena",
            str(huge_pages / "other"),
            "--http",
            "off",
        )
        assert "the pool of huge pages has" in too_much.stderr
