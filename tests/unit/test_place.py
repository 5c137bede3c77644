"""The runtime dir and its socket, in every state a machine can leave them in."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_server.protocol.presence import LOCKS, PID, SOCKET
from lmconnector.doctor.findings import Verdict
from lmconnector.doctor.place import restart, runtime_dir, server_socket
from nobody import only_root, somebody_else
from processes import short_dir


@pytest.fixture
def place() -> Iterator[Path]:
    with short_dir() as path:
        (path / LOCKS).mkdir()
        yield path


@contextlib.contextmanager
def listener(path: Path) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path / SOCKET))
        listening.listen()
        yield


def test_a_dir_of_ours_alone_is_fine(place: Path) -> None:
    place.chmod(0o700)
    finding = runtime_dir(place)
    assert finding.verdict is Verdict.OK
    assert "0700: yours alone" in finding.found


def test_a_dir_that_its_group_may_use_is_fine(place: Path) -> None:
    place.chmod(0o2770)
    finding = runtime_dir(place)
    assert finding.verdict is Verdict.OK
    assert "open to its group" in finding.found


def test_a_dir_that_everybody_may_use_is_a_warning(place: Path) -> None:
    place.chmod(0o777)
    finding = runtime_dir(place)
    assert finding.verdict is Verdict.WARN
    assert finding.advice.startswith(f"chmod 700 {place}")


def test_a_missing_dir_says_how_to_start_a_server(tmp_path: Path) -> None:
    finding = runtime_dir(tmp_path / "none")
    assert finding.verdict is Verdict.FAIL
    assert "does not exist" in finding.found
    assert finding.advice == f"start one: cache-server run --daemon --dir {tmp_path / 'none'}"


def test_a_file_is_no_runtime_dir(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finding = runtime_dir(tmp_path / "file")
    assert finding.verdict is Verdict.FAIL
    assert "no directory" in finding.found


def test_a_dir_without_its_locks_is_of_no_use(place: Path) -> None:
    (place / LOCKS).rmdir()
    assert runtime_dir(place).verdict is Verdict.FAIL


@only_root
def test_a_dir_of_another_user_says_who_may_not_use_it(place: Path) -> None:
    place.chmod(0o700)
    with somebody_else():
        finding = runtime_dir(place)
    assert finding.verdict is Verdict.FAIL
    assert "may not use" in finding.found
    assert "one user" in finding.advice


@only_root
def test_a_socket_of_another_user_says_so(place: Path) -> None:
    place.chmod(0o755)
    with listener(place):
        (place / SOCKET).chmod(0o600)
        with somebody_else():
            finding = server_socket(place)
    assert finding.verdict is Verdict.FAIL
    assert "Permission denied" in finding.found
    assert "one user" in finding.advice


def test_a_socket_with_a_listener_is_fine(place: Path) -> None:
    with listener(place):
        assert server_socket(place).verdict is Verdict.OK


def test_a_dead_servers_socket_is_told_from_a_missing_one(place: Path) -> None:
    assert "does not exist" in server_socket(place).found
    with listener(place):
        pass
    finding = server_socket(place)
    assert finding.verdict is Verdict.FAIL
    assert "dead" in finding.found
    assert finding.advice.startswith("start one: ")


def test_another_file_in_the_sockets_place_is_told(place: Path) -> None:
    (place / SOCKET).touch()
    assert server_socket(place).verdict is Verdict.FAIL


def test_a_silent_servers_process_is_named_where_it_can_be_seen(place: Path) -> None:
    assert "cache-server stop" in restart(place)
    (place / PID).write_text(f"{os.getpid()}\n")
    assert str(os.getpid()) in restart(place)
    (place / PID).write_text(f"{os.getpid()}\npid:[1]\n")
    assert str(os.getpid()) not in restart(place), "in another pid namespace that is another process"
    (place / PID).write_text("no number\n")
    assert "cache-server stop" in restart(place)
