"""The server's look at the presence files."""

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_server.limits import RefusedError
from cache_server.locks import KEPT_MAX, LockDir
from cache_server.protocol.presence import LOCKS, Presence
from nobody import only_root, somebody_else
from processes import short_dir


@pytest.fixture
def locks_path(tmp_path: Path) -> Path:
    path = tmp_path / LOCKS
    path.mkdir()
    return path


@pytest.fixture
def locks(locks_path: Path) -> Iterator[LockDir]:
    locks = LockDir(locks_path.parent)
    yield locks
    locks.close()


def test_held_files_are_told_from_those_of_the_dead(locks: LockDir, locks_path: Path) -> None:
    presences = [Presence(locks_path.parent, name) for name in ("one", "two")]
    (locks_path / "dead").touch()
    assert locks.look() == ({"one", "two"}, {"one", "two", "dead"})
    assert locks.is_locked("one")
    assert not locks.is_locked("dead")
    presences[0].close()
    assert locks.look() == ({"two"}, {"one", "two", "dead"})
    assert locks.look().dead == {"one", "dead"}, "for as long as somebody may need that"
    presences[1].close()


def test_what_the_dead_have_left_is_removed_when_that_is_said(locks: LockDir, locks_path: Path) -> None:
    presence = Presence(locks_path.parent, "held")
    for name in ("dead", "other"):
        (locks_path / name).touch()
    assert locks.look().dead == {"dead", "other"}
    locks.remove(["dead", "held", "never there"])
    assert sorted(os.listdir(locks_path)) == ["held", "other"], "what is held is not"
    assert locks.look() == ({"held"}, {"held", "other"})
    presence.close()


# --- what becomes of the names


def test_a_living_process_is_seen_whatever_becomes_of_its_name(locks: LockDir, locks_path: Path) -> None:
    """Registered, or looked at once: somebody tidies the runtime dir."""
    one, two = (Presence(locks_path.parent, name) for name in ("one", "two"))
    assert locks.is_locked("one")
    assert locks.look().living == {"one", "two"}
    (locks_path / "one").unlink()
    assert locks.look().living == {"one", "two"}
    shutil.rmtree(locks_path)
    assert locks.look().living == {"one", "two"}
    assert locks.is_locked("one")
    one.close()
    assert locks.look() == ({"two"}, {"one", "two"}), "its death is proven without a name"
    two.close()


def test_a_name_that_is_not_there_proves_nothing(tmp_path: Path) -> None:
    locks = LockDir(tmp_path / "not there")
    assert locks.look() == (frozenset(), frozenset())
    assert not locks.is_locked("name")


def test_who_takes_a_dead_ones_name_is_alive(locks: LockDir, locks_path: Path) -> None:
    first = Presence(locks_path.parent, "name")
    assert locks.look().living == {"name"}
    first.close()
    (locks_path / "name").unlink(missing_ok=True)
    second = Presence(locks_path.parent, "name")
    assert locks.look() == ({"name"}, {"name"})
    second.close()
    assert locks.look().dead == {"name"}


def test_no_descriptor_is_kept_of_the_dead_nor_at_the_end(locks: LockDir, locks_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    presences = [Presence(locks_path.parent, f"{number}") for number in range(10)]
    for _ in range(3):
        locks.look()
    assert len(os.listdir("/proc/self/fd")) == before + 20
    for presence in presences[:5]:
        presence.close()
    locks.look()
    assert len(os.listdir("/proc/self/fd")) == before + 10
    locks.close()
    assert len(os.listdir("/proc/self/fd")) == before + 5
    for presence in presences[5:]:
        presence.close()


def test_of_too_many_files_none_is_kept_open_and_each_is_seen(locks: LockDir, locks_path: Path) -> None:
    locks._kept.update({f"kept {number}": -1 for number in range(KEPT_MAX)})
    presence = Presence(locks_path.parent, "one more")
    assert locks.is_locked("one more")
    assert len(locks._kept) == KEPT_MAX
    locks._kept.clear()
    presence.close()


@only_root
def test_a_file_that_can_not_be_read_may_be_held_and_registers_nobody() -> None:
    with short_dir() as runtime_dir:
        runtime_dir.chmod(0o777)
        path = runtime_dir / LOCKS
        path.mkdir()
        path.chmod(0o777)
        presence = Presence(runtime_dir, "name")
        (path / "name").chmod(0o600)
        locks = LockDir(runtime_dir)
        with somebody_else():
            assert locks.look() == ({"name"}, {"name"})
            reason = (
                r"locks/name \(of user 0, group 0, mode 600\) can't be read by the server, user \d+: "
                "Permission denied: give it the directory's owner"
            )
            with pytest.raises(RefusedError, match=reason):
                locks.is_locked("name")
            presence.close()


# --- what lies there beside


@pytest.mark.parametrize("name", [".", "..", "../held", "a/b", "x" * 300, "not there", "\udc80", "a\0b"])
def test_what_is_no_name_of_a_presence_file_is_not_held(locks: LockDir, locks_path: Path, name: str) -> None:
    (locks_path.parent / "held").touch()
    assert not locks.is_locked(name)
    assert (locks_path.parent / "held").exists()
    assert locks_path.exists()


def test_a_link_is_not_followed(locks: LockDir, locks_path: Path) -> None:
    presence = Presence(locks_path.parent, "held")
    (locks_path / "link").symlink_to("held")
    assert locks.look().living == {"held"}
    presence.close()


def test_a_directory_among_the_files_stops_nothing(locks: LockDir, locks_path: Path) -> None:
    (locks_path / "directory").mkdir()
    presence = Presence(locks_path.parent, "held")
    assert locks.look().living == {"held"}
    presence.close()


def test_a_pipe_among_the_files_stops_nothing(locks: LockDir, locks_path: Path) -> None:
    os.mkfifo(locks_path / "pipe")
    scanner = threading.Thread(target=locks.look)
    scanner.start()
    scanner.join(2)
    stuck = scanner.is_alive()
    if stuck:
        os.close(os.open(locks_path / "pipe", os.O_RDWR))  # lets it go
        scanner.join()
    assert not stuck
