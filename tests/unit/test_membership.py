"""How a process of the engine proves to the server that it lives, and what it says when it can't."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip(
    "torch", reason="the engine is not installed: `make setup` brings it", exc_type=ImportError
)

from cache_server.protocol import messages as m
from cache_server.protocol.presence import LOCKS, lock_now
from engine_side import MemoryLink
from kit import make_service
from lmconnector.config import Options
from lmconnector.errors import RegistrationError
from lmconnector.membership import Member, registration
from processes import short_dir

NOBODY = 65_534


class Trusting(MemoryLink):
    """To a server that believes the last proof it was told."""

    def send(self, request: m.Request) -> bool:
        if isinstance(request, m.Register):
            self.world.locked.clear()
            self.world.locked.add(request.proof)
        return super().send(request)


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    with short_dir() as directory:
        (directory / LOCKS).mkdir()
        yield directory


def member_of(runtime_dir: Path) -> Member:
    link = Trusting(make_service())
    return Member(Options(dir=str(runtime_dir)), registration("engine", 0, 1, b"model"), None, lambda: link)


def why_not(member: Member) -> str:
    with pytest.raises(RegistrationError) as refused:
        member._register()
    return str(refused.value)


def can_lock(path: Path) -> bool:
    with path.open() as file:
        return lock_now(file.fileno())


@contextlib.contextmanager
def without_rights(path: Path) -> Iterator[None]:
    """As somebody who may read there and not write."""
    path.chmod(0o555)
    if is_root := os.geteuid() == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        path.chmod(0o755)


def test_without_a_runtime_dir_it_asks_for_a_server(runtime_dir: Path) -> None:
    member = member_of(runtime_dir)
    (runtime_dir / LOCKS).rmdir()
    assert why_not(member) == (
        f"{runtime_dir / LOCKS}: No such file or directory: is a server running there?"
    )
    assert why_not(member) == why_not(member), "the same words, or each attempt would be told"


def test_without_rights_it_says_whose_they_must_be_and_asks_for_no_server(runtime_dir: Path) -> None:
    runtime_dir.chmod(0o755)
    with without_rights(runtime_dir / LOCKS):
        assert why_not(member_of(runtime_dir)) == (
            f"{runtime_dir / LOCKS}: Permission denied: "
            "run engine and server as one user, or give the server a `group` that both are in"
        )


def test_any_other_reason_is_told_as_it_is(runtime_dir: Path) -> None:
    (runtime_dir / LOCKS).rmdir()
    (runtime_dir / LOCKS).touch()
    assert why_not(member_of(runtime_dir)) == f"{runtime_dir / LOCKS}: Not a directory"


def test_a_proof_that_is_replaced_is_let_go(runtime_dir: Path) -> None:
    """Somebody has removed the runtime dir's files.  The old file would be held for as long as we live."""
    member = member_of(runtime_dir)
    member._register()
    (old,) = (runtime_dir / LOCKS).iterdir()
    kept = runtime_dir / "kept"
    os.link(old, kept)
    shutil.rmtree(runtime_dir / LOCKS)
    (runtime_dir / LOCKS).mkdir()
    member._register()
    (new,) = (runtime_dir / LOCKS).iterdir()
    assert new.name != old.name
    assert can_lock(kept)
    with new.open() as file:
        assert not lock_now(file.fileno())
        member.close()
        assert lock_now(file.fileno())


@pytest.mark.parametrize("copies_ended", [True, False])
def test_the_proof_is_kept_while_a_copy_may_still_write(runtime_dir: Path, copies_ended: bool) -> None:
    """What it writes to would be given to others; the kernel lets go of it when the process is dead."""
    member = member_of(runtime_dir)
    member._register()
    (file,) = (runtime_dir / LOCKS).iterdir()
    kept = runtime_dir / "kept"
    os.link(file, kept)
    member.close(copies_ended=copies_ended)
    assert can_lock(kept) == copies_ended
