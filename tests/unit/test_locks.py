"""The server's look at the presence files."""

import os
import threading
from pathlib import Path

import pytest

from cache_server.locks import LockDir
from cache_server.protocol.presence import LOCKS, Presence


@pytest.fixture
def locks_path(tmp_path: Path) -> Path:
    path = tmp_path / LOCKS
    path.mkdir()
    return path


@pytest.fixture
def locks(locks_path: Path) -> LockDir:
    return LockDir(locks_path.parent)


def test_held_files_are_named_and_others_removed(locks: LockDir, locks_path: Path) -> None:
    presences = [Presence(locks_path.parent, name) for name in ("one", "two")]
    (locks_path / "dead").touch()
    assert locks.scan() == {"one", "two"}
    assert not (locks_path / "dead").exists()
    assert locks.is_locked("one")
    presences[0].close()
    assert locks.scan() == {"two"}
    presences[1].close()
    assert locks.scan() == frozenset()
    assert list(locks_path.iterdir()) == []


def test_without_the_directory_nobody_lives(tmp_path: Path) -> None:
    assert LockDir(tmp_path / "not there").scan() == frozenset()
    assert not LockDir(tmp_path / "not there").is_locked("name")


@pytest.mark.parametrize("name", [".", "..", "../held", "a/b", "x" * 300, "not there", "\udc80"])
def test_what_is_no_name_of_a_presence_file_is_not_held(locks: LockDir, locks_path: Path, name: str) -> None:
    (locks_path.parent / "held").touch()
    assert not locks.is_locked(name)
    assert (locks_path.parent / "held").exists()
    assert locks_path.exists()


def test_a_link_is_not_followed(locks: LockDir, locks_path: Path) -> None:
    presence = Presence(locks_path.parent, "held")
    (locks_path / "link").symlink_to("held")
    assert locks.scan() == {"held"}
    presence.close()


def test_a_directory_among_the_files_stops_nothing(locks: LockDir, locks_path: Path) -> None:
    (locks_path / "directory").mkdir()
    presence = Presence(locks_path.parent, "held")
    assert locks.scan() == {"held"}
    presence.close()


def test_a_pipe_among_the_files_stops_nothing(locks: LockDir, locks_path: Path) -> None:
    os.mkfifo(locks_path / "pipe")
    scanner = threading.Thread(target=locks.scan)
    scanner.start()
    scanner.join(2)
    stuck = scanner.is_alive()
    if stuck:
        os.close(os.open(locks_path / "pipe", os.O_RDWR))  # lets it go
        scanner.join()
    assert not stuck
