"""A process holds its presence file until it is dead, however it dies."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cache_server.locks import LockDir
from cache_server.protocol.keys import owner_of
from cache_server.protocol.presence import LOCKS, Presence, lock_now, presence_name

HOLDER = """
import sys
from pathlib import Path
from cache_server.protocol.presence import Presence
presence = Presence(Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    (tmp_path / LOCKS).mkdir()
    return tmp_path


@contextmanager
def holder(runtime_dir: Path, name: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that holds the file of that name, for as long as it lives."""
    command = [sys.executable, "-c", HOLDER, str(runtime_dir), name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"held\n"
            yield process
        finally:
            process.kill()


def can_lock(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return lock_now(fd)
    finally:
        os.close(fd)


def test_it_is_held_from_the_first_moment_to_the_last(runtime_dir: Path) -> None:
    presence = Presence(runtime_dir, "name")
    path = runtime_dir / LOCKS / "name"
    assert presence.name == "name"
    assert path.stat().st_mode & 0o007 == 0
    assert not can_lock(path)
    presence.close()
    assert not path.exists()


def test_it_can_be_closed_when_somebody_has_removed_the_file(runtime_dir: Path) -> None:
    presence = Presence(runtime_dir, "name")
    (runtime_dir / LOCKS / "name").unlink()
    presence.close()


def test_every_life_has_a_name_of_its_own_under_its_engines_mark() -> None:
    names = {presence_name("engine") for _ in range(100)}
    assert len(names) == 100
    assert all(name.partition(".")[0] == owner_of("engine").hex() for name in names)


def test_its_descriptor_does_not_pass_to_other_programs(runtime_dir: Path) -> None:
    presence = Presence(runtime_dir, "name")
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE
    ) as child:
        presence.close()
        Presence(runtime_dir, "name").close()  # at once: the child holds nothing
        child.kill()


@pytest.mark.chaos
def test_the_kernel_lets_go_when_the_process_is_killed(runtime_dir: Path) -> None:
    path = runtime_dir / LOCKS / "name"
    with holder(runtime_dir, "name") as process:
        assert not can_lock(path)
        process.kill()
        process.wait()
        assert path.exists()
        assert can_lock(path)


@pytest.mark.chaos
def test_a_successor_of_the_same_name_waits_until_the_first_is_dead(runtime_dir: Path) -> None:
    held = threading.Event()
    presences: list[Presence] = []

    def succeed() -> None:
        presences.append(Presence(runtime_dir, "name"))
        held.set()

    with holder(runtime_dir, "name") as process:
        successor = threading.Thread(target=succeed)
        successor.start()
        assert not held.wait(0.1)
        process.kill()
        assert held.wait(10)
    successor.join()
    assert LockDir(runtime_dir).scan() == {"name"}
    presences[0].close()


def test_a_file_removed_while_it_was_waited_for_is_made_again(runtime_dir: Path) -> None:
    """As the server does with what looks like a dead process's file."""
    path = runtime_dir / LOCKS / "name"
    path.touch()
    fd = os.open(path, os.O_RDONLY)
    assert lock_now(fd)
    presences: list[Presence] = []
    successor = threading.Thread(target=lambda: presences.append(Presence(runtime_dir, "name")))
    successor.start()
    path.unlink()
    os.close(fd)
    successor.join(10)
    assert not can_lock(path)
    presences[0].close()


def test_scans_and_processes_that_come_and_go_never_miss_each_other(runtime_dir: Path) -> None:
    """Whatever the order: between its making and its closing a presence is seen by every scan."""
    locks = LockDir(runtime_dir)
    stop = threading.Event()

    def scan() -> None:
        while not stop.is_set():
            locks.scan()

    scanner = threading.Thread(target=scan)
    scanner.start()
    try:
        for _ in range(5_000):
            presence = Presence(runtime_dir, "name")
            assert locks.is_locked("name")
            assert "name" in locks.scan()
            presence.close()
    finally:
        stop.set()
        scanner.join()
