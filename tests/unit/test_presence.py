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
from cache_server.protocol.presence import (
    LOCKS,
    NAMES_MAX,
    Presence,
    lock_now,
    open_shared,
    presence_name,
)
from nobody import NOBODY, only_root, somebody_else
from processes import short_dir

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
    assert can_lock(path), "the file stays, as a proof"


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


@contextmanager
def locked_by_another(*paths: Path) -> Iterator[None]:
    """By a server that was stopped when it had just looked whether somebody holds these files."""
    files = [path.open("w") for path in paths]
    try:
        assert all(lock_now(file.fileno()) for file in files)
        yield
    finally:
        for file in files:
            file.close()


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize(("of_the_dir", "of_the_file"), [(0o700, 0o600), (0o2770, 0o660), (0o755, 0o640)])
def test_a_file_is_as_open_as_its_directory_whatever_the_umask(
    runtime_dir: Path, of_the_dir: int, of_the_file: int, mask: int
) -> None:
    (runtime_dir / LOCKS).chmod(of_the_dir)
    with umask(mask):
        Presence(runtime_dir, "name").close()
    assert (runtime_dir / LOCKS / "name").stat().st_mode & 0o777 == of_the_file


@only_root
def test_a_file_that_root_makes_is_for_the_servers_user_to_read_and_to_use() -> None:
    with short_dir() as runtime_dir:
        (runtime_dir / LOCKS).mkdir()
        for path in (runtime_dir, runtime_dir / LOCKS):
            os.chown(path, NOBODY, NOBODY)
            path.chmod(0o700)
        presence = Presence(runtime_dir, "name")
        made = (runtime_dir / LOCKS / "name").stat()
        assert (made.st_uid, made.st_gid, made.st_mode & 0o777) == (NOBODY, NOBODY, 0o600)
        os.close(open_shared(runtime_dir / "a.lock"))
        with somebody_else():
            locks = LockDir(runtime_dir)
            assert locks.is_locked("name")
            locks.close()
            os.close(open_shared(runtime_dir / "a.lock"))
        presence.close()


@only_root
def test_what_is_there_already_is_nobody_elses_then() -> None:
    with short_dir() as runtime_dir:
        os.chown(runtime_dir, NOBODY, NOBODY)
        roots, link = runtime_dir / "root's", runtime_dir / "link"
        roots.touch(0o600)
        os.close(open_shared(roots))
        link.symlink_to(roots)
        with pytest.raises(OSError, match="Too many levels of symbolic links") as refused:
            open_shared(link)
        assert refused.value.filename == str(link)
        assert (roots.stat().st_uid, roots.stat().st_mode & 0o777) == (0, 0o600)


def test_a_name_that_another_has_locked_is_not_waited_for(runtime_dir: Path) -> None:
    with locked_by_another(*(runtime_dir / LOCKS / name for name in ("name", "name.1"))):
        presence = Presence(runtime_dir, "name")
        assert presence.name == "name.2"
        assert not can_lock(runtime_dir / LOCKS / presence.name)
        presence.close()


def test_where_no_name_is_to_be_had_it_says_so_and_keeps_no_file_open(runtime_dir: Path) -> None:
    names = ["name", *(f"name.{number}" for number in range(1, NAMES_MAX))]
    with locked_by_another(*(runtime_dir / LOCKS / name for name in names)):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(OSError, match="8 new files were locked or removed by somebody else") as refused:
            Presence(runtime_dir, "name")
        assert Path(refused.value.filename).parent == runtime_dir / LOCKS
        assert os.listdir("/proc/self/fd") == before


def test_it_can_be_closed_where_its_directory_has_become_something_else(runtime_dir: Path) -> None:
    presence = Presence(runtime_dir, "name")
    (runtime_dir / LOCKS).rename(runtime_dir / "elsewhere")
    (runtime_dir / LOCKS).touch()
    presence.close()
    assert can_lock(runtime_dir / "elsewhere" / "name")


def test_scans_and_processes_that_come_and_go_never_miss_each_other(runtime_dir: Path) -> None:
    """Whatever the order: between its making and its closing a presence is seen by every scan."""
    locks = LockDir(runtime_dir)
    stop = threading.Event()

    def scan() -> None:
        server = LockDir(runtime_dir)
        while not stop.is_set():
            server.remove(sorted(server.look().dead))
        server.close()

    scanner = threading.Thread(target=scan)
    scanner.start()
    try:
        for _ in range(5_000):
            presence = Presence(runtime_dir, "name")
            assert locks.is_locked(presence.name)
            assert presence.name in locks.look().living
            presence.close()
    finally:
        stop.set()
        scanner.join()
        locks.close()
