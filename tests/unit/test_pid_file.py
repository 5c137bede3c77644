"""Which process serves, and whether its number means the same process to who reads it."""

import os
from pathlib import Path

import pytest

from cache_server.protocol.pid_file import ServerPid, own_namespace, read_pid


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    (tmp_path / "pid").write_text(ServerPid.own().text)
    assert read_pid(tmp_path / "pid") == ServerPid(os.getpid(), own_namespace())
    assert (tmp_path / "pid").read_text().splitlines()[0] == str(os.getpid()), "for who reads one number"


def test_a_namespace_is_named_as_the_kernel_does() -> None:
    assert own_namespace() == f"pid:[{os.stat('/proc/self/ns/pid').st_ino}]"


def test_a_number_counts_in_its_own_namespace_alone() -> None:
    assert ServerPid.own().counts_here
    assert not ServerPid(os.getpid(), "pid:[1]").counts_here


def test_a_number_by_itself_counts_as_before(tmp_path: Path) -> None:
    for text in ("12", "12\n"):
        (tmp_path / "pid").write_text(text)
        assert read_pid(tmp_path / "pid") == ServerPid(12, "")
    assert ServerPid(12, "").counts_here


@pytest.mark.parametrize(
    "text", ["", "\n", "garbage", "0", "-1", "1 2", "99999999999", "pid:[1]\n12", "\xb2"]
)
def test_what_is_no_process_is_refused_with_what_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "pid").write_text(text)
    with pytest.raises(ValueError, match="expected a process id"):
        read_pid(tmp_path / "pid")
