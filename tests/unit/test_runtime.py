"""The runtime dir: made, guarded against a second server, tidied away."""

import grp
import os
import signal
import stat
import subprocess
import sys
import threading
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from cache_server.protocol.pid_file import ServerPid, read_pid
from cache_server.protocol.presence import ARENA, LOCKS, PID, TOKEN, lock_now
from cache_server.runtime import (
    FILES,
    Access,
    CannotTellError,
    RuntimeDirError,
    admin_token,
    is_served,
    note_arena,
    prepare,
    purge,
    running_server,
    sole_server,
)
from cache_server.shm import BLOCK_BYTES, open_arena
from nobody import only_root, somebody_else
from processes import short_dir

SERVER = """
import sys
from pathlib import Path
from cache_server.runtime import Access, sole_server
with sole_server(Path(sys.argv[1]), Access(None)):
    print("serving", flush=True)
    sys.stdin.read()
"""
OWNER_ONLY = Access(None)


@pytest.fixture
def runtime_dir(tmp_path: Path) -> Path:
    prepare(tmp_path / "run")
    return tmp_path / "run"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- the directory


def test_it_is_for_its_user_alone(runtime_dir: Path) -> None:
    for _ in range(2):
        with alone(runtime_dir):
            assert mode(runtime_dir) == mode(runtime_dir / LOCKS) == 0o700
        prepare(runtime_dir)  # again is no matter


def test_what_was_open_is_closed(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o777)
    with alone(runtime_dir):
        assert mode(runtime_dir) == 0o700


def test_it_opens_to_one_group_and_who_is_refused_does_not_close_it(runtime_dir: Path) -> None:
    name = grp.getgrgid(os.getegid()).gr_name
    access = Access.of_group(name)
    with sole_server(runtime_dir, access):
        assert mode(runtime_dir) == mode(runtime_dir / LOCKS) == 0o2770
        assert runtime_dir.stat().st_gid == os.getegid()
        (runtime_dir / ARENA).touch()
        access.open_file(runtime_dir / ARENA)
        assert mode(runtime_dir / ARENA) == access.file_mode == 0o660
        prepare(runtime_dir)
        with pytest.raises(RuntimeDirError, match="already runs"):
            alone(runtime_dir).__enter__()
        assert mode(runtime_dir) == mode(runtime_dir / LOCKS) == 0o2770
    assert Access.of_group("") == OWNER_ONLY
    assert OWNER_ONLY.file_mode == 0o600


@only_root
def test_a_group_that_its_user_is_no_member_of_is_named() -> None:
    with short_dir() as parent:
        parent.chmod(0o777)
        with somebody_else():
            prepare(parent / "run")
            with (
                pytest.raises(
                    RuntimeDirError, match="group = 'daemon': Operation not permitted: choose a group"
                ),
                sole_server(parent / "run", Access.of_group("daemon")),
            ):
                pass


def test_a_directory_of_somebody_elses_files_is_left_as_it_is(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for name in ("arena", "letters", "pictures", "songs", "thesis"):
        (tmp_path / name).touch()
    words = r"has files that are no cache server's \(letters, pictures, songs and 1 more\)"
    with pytest.raises(RuntimeDirError, match=words):
        prepare(tmp_path)
    with pytest.raises(RuntimeDirError, match=f"{words}: nothing was removed"):
        purge(tmp_path, None)
    assert mode(tmp_path) == 0o755
    assert len(list(tmp_path.iterdir())) == 5


def test_what_an_operator_leaves_beside_a_servers_files_is_in_nobodys_way(runtime_dir: Path) -> None:
    with alone(runtime_dir):
        admin_token(runtime_dir)
    (runtime_dir / "server.log.1.gz").touch()
    prepare(runtime_dir)


def test_a_directory_that_all_users_share_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    with pytest.raises(
        RuntimeDirError, match=f"is shared by all users: choose one of its own, {tmp_path}/cache"
    ):
        prepare(tmp_path)
    assert mode(tmp_path) == 0o1777


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(RuntimeDirError, match="group = 'no-such-group': this machine has no such group"):
        Access.of_group("no-such-group")


def test_a_file_in_its_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeDirError, match=r"file: File exists: choose another --dir"):
        prepare(tmp_path / "file")
    with pytest.raises(RuntimeDirError, match="Not a directory"):
        prepare(tmp_path / "file" / "run")


# --- one server


def alone(runtime_dir: Path) -> AbstractContextManager[None]:
    return sole_server(runtime_dir, OWNER_ONLY)


def test_a_second_server_is_refused_with_the_first_ones_pid(runtime_dir: Path) -> None:
    with alone(runtime_dir):
        assert running_server(runtime_dir) == read_pid(runtime_dir / PID) == ServerPid.own()
        with pytest.raises(RuntimeDirError, match=rf"a server \(pid {os.getpid()}\) already runs on it"):
            alone(runtime_dir).__enter__()
        assert running_server(runtime_dir) == ServerPid.own()  # being refused has not disturbed the first
    assert not is_served(runtime_dir)
    assert not (runtime_dir / PID).exists()
    with alone(runtime_dir):
        assert running_server(runtime_dir) == ServerPid.own()


def test_who_asks_for_the_running_server_keeps_none_from_starting_and_no_other_from_asking(
    runtime_dir: Path,
) -> None:
    """A tool looks at the lock by taking it: a server that starts at this moment has to outwait that."""
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            is_served(runtime_dir)

    asking = threading.Thread(target=ask)
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    asking.start()
    try:
        for _ in range(1_000):
            assert not is_served(runtime_dir)
            with alone(runtime_dir):
                pass
    finally:
        sys.setswitchinterval(interval_s)
        stop.set()
        asking.join()


@pytest.mark.parametrize("text", ["1\n", "garbage", "", "99999999999\n"])
def test_a_pid_file_without_its_server_is_stale(runtime_dir: Path, text: str) -> None:
    (runtime_dir / PID).write_text(text)
    assert running_server(runtime_dir) is None
    with alone(runtime_dir):
        assert running_server(runtime_dir) == ServerPid.own()


def test_no_dir_no_server(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "not there", tmp_path / "file"):
        assert not is_served(path)
        assert running_server(path) is None


def test_a_server_whose_process_can_not_be_read_is_one_nevertheless(runtime_dir: Path) -> None:
    with alone(runtime_dir):
        (runtime_dir / PID).write_text("garbage\n")
        with pytest.raises(CannotTellError, match=rf"server\.pid has 'garbage.*fuser {runtime_dir}"):
            running_server(runtime_dir)
        (runtime_dir / PID).unlink()
        with pytest.raises(CannotTellError, match=r"No such file.*`kill -TERM` stops it"):
            running_server(runtime_dir)
        assert is_served(runtime_dir)


@only_root
def test_who_may_not_look_can_not_tell() -> None:
    said = r"Permission denied: can't tell .* run this as the user"
    with short_dir() as path, somebody_else(), pytest.raises(CannotTellError, match=said):
        is_served(path)


def test_the_group_may_read_which_process_it_is(runtime_dir: Path) -> None:
    with sole_server(runtime_dir, Access(os.getgid())):
        assert mode(runtime_dir / PID) == 0o660
    with alone(runtime_dir):
        assert mode(runtime_dir / PID) == 0o600


@pytest.mark.chaos
def test_a_killed_server_leaves_the_dir_free(runtime_dir: Path) -> None:
    command = [sys.executable, "-c", SERVER, str(runtime_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"serving\n"
        assert running_server(runtime_dir) == ServerPid(server.pid, ServerPid.own().namespace)
        with pytest.raises(RuntimeDirError, match=str(server.pid)):
            alone(runtime_dir).__enter__()
        server.send_signal(signal.SIGKILL)
    assert read_pid(runtime_dir / PID).pid == server.pid
    assert running_server(runtime_dir) is None
    with alone(runtime_dir):
        assert running_server(runtime_dir) == ServerPid.own()


def test_a_server_that_ends_by_an_error_lets_go(runtime_dir: Path) -> None:
    with pytest.raises(ZeroDivisionError), alone(runtime_dir):
        raise ZeroDivisionError
    assert not is_served(runtime_dir)


def test_who_removes_the_pid_file_of_a_running_server_gets_no_second_one(runtime_dir: Path) -> None:
    """Two servers on one arena would hand out the same slots."""
    with alone(runtime_dir):
        (runtime_dir / PID).unlink()  # somebody took it for stale
        with pytest.raises(RuntimeDirError, match="a server already runs on it"), alone(runtime_dir):
            pass


def test_a_server_whose_dir_was_removed_leaves_its_successors_pid_alone(runtime_dir: Path) -> None:
    with alone(runtime_dir):
        runtime_dir.rename(runtime_dir.with_name("removed"))
        prepare(runtime_dir)
        (runtime_dir / PID).write_text("another's\n")
    assert (runtime_dir / PID).read_text() == "another's\n"


# --- the token


def test_a_token_is_secret_and_kept(runtime_dir: Path) -> None:
    token = admin_token(runtime_dir)
    assert len(token) == 32
    assert mode(runtime_dir / TOKEN) == 0o600
    assert admin_token(runtime_dir) == token
    assert (runtime_dir / TOKEN).read_text().strip() == token


@pytest.mark.parametrize("spoil", ["others may read it", "it is empty"])
def test_a_token_that_is_not_secret_is_made_anew(runtime_dir: Path, spoil: str) -> None:
    token = admin_token(runtime_dir)
    if spoil == "it is empty":
        (runtime_dir / TOKEN).write_text("\n")
    else:
        (runtime_dir / TOKEN).chmod(0o640)
    again = admin_token(runtime_dir)
    assert again
    assert again != token
    assert mode(runtime_dir / TOKEN) == 0o600
    assert admin_token(runtime_dir) == again


# --- purge


def test_purge_leaves_nothing(runtime_dir: Path) -> None:
    (runtime_dir / LOCKS).mkdir()
    for name in (*FILES, ARENA, f"{LOCKS}/engine"):
        (runtime_dir / name).touch()
    assert purge(runtime_dir, None) == [runtime_dir / ARENA, runtime_dir]
    assert not runtime_dir.exists()
    assert purge(runtime_dir, None) == []


def test_purge_keeps_what_is_not_the_servers(runtime_dir: Path, tmp_path: Path) -> None:
    arena = tmp_path / "arena elsewhere"
    arena.touch()
    (runtime_dir / LOCKS).mkdir()
    for name in ("notes", TOKEN):
        (runtime_dir / name).touch()
    assert purge(runtime_dir, arena) == [arena]
    assert [path.name for path in runtime_dir.iterdir()] == ["notes"]


def test_purge_finds_the_arena_that_was_served(runtime_dir: Path, tmp_path: Path) -> None:
    arena = tmp_path / "arena elsewhere"
    open_arena(arena, 16 << 20, 0o600).close()
    note_arena(runtime_dir, arena, OWNER_ONLY)
    assert purge(runtime_dir, None) == [arena, runtime_dir]


def test_purge_removes_no_file_that_is_no_arena(runtime_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("of four years")
    with pytest.raises(RuntimeDirError, match="thesis: it was not removed: the file is no arena"):
        purge(runtime_dir, tmp_path / "thesis")
    assert (tmp_path / "thesis").read_text() == "of four years"
    assert runtime_dir.exists()


def test_purge_frees_the_memory_of_an_arena_that_engines_still_map(runtime_dir: Path) -> None:
    file = open_arena(runtime_dir / ARENA, 16 << 20, 0o600)
    os.posix_fallocate(file.fd, 0, file.geometry.file_bytes)
    file.close()
    with (runtime_dir / ARENA).open("rb") as mapped:
        purge(runtime_dir, runtime_dir / ARENA)
        assert os.fstat(mapped.fileno()).st_blocks * BLOCK_BYTES < 4 << 20


def test_purge_takes_nothing_from_a_server_that_runs(runtime_dir: Path) -> None:
    with alone(runtime_dir):
        (runtime_dir / PID).unlink()  # whatever else says that there is none
        (runtime_dir / ARENA).touch()
        with pytest.raises(RuntimeDirError, match="already runs on it: nothing was removed"):
            purge(runtime_dir, runtime_dir / ARENA)
        assert sorted(path.name for path in runtime_dir.iterdir()) == [ARENA, LOCKS]


def test_purge_takes_no_arena_that_a_server_with_another_dir_uses(runtime_dir: Path, tmp_path: Path) -> None:
    arena = tmp_path / "arena elsewhere"
    with arena.open("w") as used:
        assert lock_now(used.fileno())
        with pytest.raises(RuntimeDirError, match="a server with another --dir uses it"):
            purge(runtime_dir, arena)
    assert arena.exists()


@only_root
def test_purge_by_who_may_not_says_what_it_could_not_remove() -> None:
    with short_dir() as path:
        path.chmod(0o755)
        (path / TOKEN).touch()
        with (
            somebody_else(),
            pytest.raises(RuntimeDirError, match=rf"{TOKEN}: Permission denied: .* run this"),
        ):
            purge(path, path / ARENA)
