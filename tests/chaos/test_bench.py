"""`lmconnector bench` on a server of its own, on one that runs, and where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip(
    "torch", reason="the engine is not installed: `make setup` brings it", exc_type=ImportError
)

from cache_server.protocol.presence import LOCKS
from lmconnector import __version__
from processes import eventually, server, short_dir

pytestmark = pytest.mark.chaos

ALONE = ("--canary-idle", "off", "--capacity", "256MiB")
MEMORY = Path("/dev/shm")


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lmconnector.cli", "bench", *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def check(report: dict) -> None:
    assert report["version"] == __version__
    rows = {row["name"]: row for row in report["rows"]}
    kinds = [name.partition(",")[0] for name in rows]
    assert kinds == ["PING", "LOOKUP of 512", "registration", "store", "load"]
    for row in rows.values():
        assert 0 < row["ours"]["least"] <= row["ours"]["median"] <= row["ours"]["most"], row
    assert rows["PING"]["share"]["median"] > 0.2, "an answer is not faster than an echo by far"
    assert [row["beside"] for row in rows.values()] == ["echo", "echo", "", "memcpy", "memcpy"]


def test_without_a_server_it_starts_one_and_leaves_nothing() -> None:
    before = set(os.listdir(MEMORY))
    done = bench("--json")
    assert (done.returncode, done.stderr) == (0, "")
    check(json.loads(done.stdout))
    assert not [name for name in set(os.listdir(MEMORY)) - before if name.startswith("lmconnector-bench-")]


def test_a_server_that_runs_is_as_before() -> None:
    with server(*ALONE) as process:
        process.populated()
        done = bench("--json", "--dir", str(process.runtime_dir))
        assert (done.returncode, done.stderr) == (0, "")
        report = json.loads(done.stdout)
        check(report)
        assert report["server"] == str(process.runtime_dir)
        status = process.check_conservation()
        assert status.worker_rows == ()
        assert (status.arena.stocked_bytes, status.leases.outstanding, status.chunks.stored) == (0, 0, 0)
        eventually(lambda: not list((process.runtime_dir / LOCKS).iterdir()), "its files are removed")


def test_where_no_server_is_it_says_who_looks_closer() -> None:
    with short_dir() as nowhere:
        done = bench("--dir", str(nowhere))
    assert done.returncode == 1
    assert "no answer" in done.stderr
    assert "lmconnector doctor" in done.stderr
