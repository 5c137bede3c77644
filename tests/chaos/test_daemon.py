"""The daemon as an operator meets it: real processes, real signals, real files."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cache_server.client import Client, RefusedError
from cache_server.protocol import messages as m
from cache_server.runtime import running_pid
from cache_server.session import Session
from processes import ServerProcess, eventually, server, short_dir

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
        pid = running_pid(directory)
        assert pid is not None
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
        assert "its files are removed" in cache_server("stop", "--purge", *common).stdout
        assert not directory.exists()


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


def test_the_service_manager_is_told(tmp_path: Path) -> None:
    with short_dir() as directory, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        address = str(tmp_path / "notify")
        manager.bind(address)
        manager.settimeout(10)
        environment = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "1000000"}
        process = ServerProcess(directory, environment=environment)
        with process:
            assert manager.recv(4096).startswith(f"READY=1\nMAINPID={process.pid}".encode())
            assert manager.recv(4096) == b"WATCHDOG=1"
            os.kill(process.pid, signal.SIGTERM)
            while (said := manager.recv(4096)) == b"WATCHDOG=1":
                pass
            assert said == b"STOPPING=1"
            assert process.process.wait(5) == 0


def test_files_are_for_their_user_alone() -> None:
    with server() as process:
        modes = {path.name: path.stat().st_mode & 0o777 for path in process.runtime_dir.iterdir()}
        assert process.runtime_dir.stat().st_mode & 0o777 == 0o700
        assert modes == {
            "arena": 0o600,
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
            "locks": 0o2770,
            "server.pid": 0o600,
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
        pytest.skip(f"can't mount hugetlbfs here: {mounted.stderr.decode().strip()}")
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
