"""The holds on readiness: kept by owner, each to its end, whoever writes at the same time."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cache_server.hold_file import HoldError, hold, read_holds, unhold
from cache_server.holds import HOLDS_MAX, TTL_MS_MAX, Hold
from cache_server.protocol.presence import HOLDS, HOLDS_LOCK
from cache_server.runtime import purge
from nobody import NOBODY, only_root, somebody_else
from processes import short_dir

NOW_MS = 1_000_000


def of(owner: str, ttl_ms: int = 1_000, reason: str = "r") -> Hold:
    return Hold(owner, reason, NOW_MS + ttl_ms)


def owners(runtime_dir: Path, now_ms: int = NOW_MS) -> list[str]:
    return sorted(each.owner for each in read_holds(runtime_dir, now_ms))


def test_each_owner_has_one_and_ends_only_its_own(tmp_path: Path) -> None:
    hold(tmp_path, of("a"), NOW_MS)
    hold(tmp_path, of("b"), NOW_MS)
    hold(tmp_path, of("a", 5_000, "longer"), NOW_MS)
    assert {each.owner: each.reason for each in read_holds(tmp_path, NOW_MS)} == {"a": "longer", "b": "r"}
    assert unhold(tmp_path, "b", NOW_MS)
    assert not unhold(tmp_path, "b", NOW_MS)
    assert owners(tmp_path) == ["a"]


def test_it_ends_by_its_time(tmp_path: Path) -> None:
    hold(tmp_path, of("a", 1_000), NOW_MS)
    assert owners(tmp_path, NOW_MS + 999) == ["a"]
    assert owners(tmp_path, NOW_MS + 1_000) == []
    assert not unhold(tmp_path, "a", NOW_MS + 1_000)


def test_the_longest_counts_and_one_of_another_boot_of_the_machine_does_not(tmp_path: Path) -> None:
    hold(tmp_path, of("a", TTL_MS_MAX), NOW_MS)
    assert owners(tmp_path) == ["a"]
    assert owners(tmp_path, NOW_MS - 1) == []


def test_there_is_a_most_and_what_has_ended_does_not_count(tmp_path: Path) -> None:
    for number in range(HOLDS_MAX):
        hold(tmp_path, of(f"{number}"), NOW_MS)
    with pytest.raises(HoldError, match="64 owners"):
        hold(tmp_path, of("one more"), NOW_MS)
    hold(tmp_path, of("0", 2_000), NOW_MS)
    hold(tmp_path, of("one more", 2_000), NOW_MS + 1_500)
    assert owners(tmp_path, NOW_MS + 1_500) == ["0", "one more"]


SPOILED = [
    b"",
    b"nonsense",
    b'[{"owner": 1}]',
    b"\xff" * 100,
    b'[{"owner":"\xff"}]',
    b'[{"x":' + b"[" * 9_999,
]


@pytest.mark.parametrize("content", SPOILED, ids=lambda content: repr(content[:12]))
def test_what_is_no_list_of_holds_holds_nothing_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / HOLDS).write_bytes(content)
    assert owners(tmp_path) == []
    hold(tmp_path, of("a"), NOW_MS)
    assert owners(tmp_path) == ["a"]


def test_many_at_once_lose_none(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: hold(tmp_path, of(f"{number}"), NOW_MS), range(HOLDS_MAX)))
    assert len(owners(tmp_path)) == HOLDS_MAX


def test_a_purge_takes_them_along(tmp_path: Path) -> None:
    hold(tmp_path, of("a"), NOW_MS)
    assert {path.name for path in tmp_path.iterdir()} == {HOLDS, HOLDS_LOCK}
    purge(tmp_path, tmp_path / "arena")
    assert not tmp_path.exists()


WRONG = [
    ["hold", "--owner", "x", "--ttl", "0s", "--reason", "r"],
    ["hold", "--owner", "x", "--ttl", "25h", "--reason", "r"],
    ["hold", "--owner", "x", "--ttl", "nan", "--reason", "r"],
    ["hold", "--owner", " ", "--ttl", "1m", "--reason", "r"],
    ["hold", "--owner", "x" * 65, "--ttl", "1m", "--reason", "r"],
    ["hold", "--owner", "x", "--ttl", "1m", "--reason", "two\nlines"],
    ["hold", "--owner", "x", "--ttl", "1m"],
    ["unhold"],
]


@pytest.mark.parametrize("arguments", WRONG, ids=lambda each: " ".join(each)[:40])
def test_a_hold_that_makes_no_sense_is_refused(tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-m", "cache_server", *arguments, "--dir", str(tmp_path)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 2
    assert "--" in told.stderr
    assert list(tmp_path.iterdir()) == []


def test_where_no_runtime_dir_is_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cache_server", "unhold", "--owner", "x", "--dir", f"{tmp_path}/none"]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 1
    assert "no server runs on" in told.stderr


@only_root
def test_what_root_holds_the_servers_user_sees_and_ends() -> None:
    with short_dir() as runtime_dir:
        os.chown(runtime_dir, NOBODY, NOBODY)
        before = os.umask(0o077)
        try:
            hold(runtime_dir, Hold("root", "an upgrade", 1_000), 0)
        finally:
            os.umask(before)
        with somebody_else():
            assert [each.owner for each in read_holds(runtime_dir, 0)] == ["root"]
            assert unhold(runtime_dir, "root", 0)
            hold(runtime_dir, Hold("server", "its own", 1_000), 0)
