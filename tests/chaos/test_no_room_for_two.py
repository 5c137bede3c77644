"""An arena is given up where there is no room for a second one, and an engine still maps it."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cache_server.session import Session
from chaos.campaign.stage import own_memory
from processes import ServerProcess, eventually, server
from tools import lacking

pytestmark = pytest.mark.chaos

MOUNT_MIB = 76  # for the 64 MiB of an arena, its tables, and once more its tables
CHUNK = 1 << 20
CHUNKS = 40
HASHES = [bytes([number]) * 32 for number in range(1, CHUNKS + 1)]
CONTENTS = [bytes([number]) * CHUNK for number in range(1, CHUNKS + 1)]

GiveUp = Callable[[ServerProcess, Path], None]


@pytest.fixture
def arena() -> Iterator[Path]:
    with own_memory(MOUNT_MIB) as mount:
        if mount is None:
            lacking("this user may not mount")
        yield mount / "arena"


def remove(cache: ServerProcess, arena: Path) -> None:
    boot = cache.status().boot
    arena.unlink()
    eventually(lambda: cache.answers() and cache.status().boot != boot, "another boot", 20.0)


def of_another_format(cache: ServerProcess, arena: Path) -> None:
    cache.kill()
    script = Path(__file__).parents[1] / "other_version.py"
    command = [sys.executable, str(script), "format", "run", "--dir", str(cache.runtime_dir), *cache.options]
    with cache.log.open("ab") as log:
        cache.process = subprocess.Popen(command, stdout=log, stderr=log, env=cache.environment)
    eventually(cache.answers, "first PONG", 20.0)
    cache.restart()


def store(session: Session) -> None:
    """More than half of what there is."""
    for first in range(0, CHUNKS, 4):
        some = slice(first, first + 4)
        session.store(HASHES[some], CONTENTS[some], HASHES[first - 1] if first else b"")


def purge(cache: ServerProcess, arena: Path) -> None:
    options = ("--dir", str(cache.runtime_dir), *cache.options)
    subprocess.run(
        [sys.executable, "-m", "cache_server", "stop", "--purge", *options], check=True, timeout=60
    )
    assert cache.process is not None
    cache.process.wait()
    assert not arena.exists()
    cache.start()


@pytest.mark.parametrize("give_up", [remove, of_another_format, purge])
def test_its_memory_is_the_next_ones_at_once(arena: Path, give_up: GiveUp) -> None:
    with server("--arena", str(arena)) as cache, contextlib.ExitStack() as stack:
        for engine in ("that maps the old one", "that uses the new one"):
            session = Session(cache.runtime_dir, engine, CHUNK)
            stack.callback(session.abandon)
            store(session)
            assert session.load(HASHES) == CONTENTS
            if engine == "that maps the old one":
                give_up(cache, arena)
                cache.populated()
