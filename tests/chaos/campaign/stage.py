"""The cache server of a campaign, and the relay before it; engines know only the relay's dir."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cache_server.faults import SWITCH
from cache_server.protocol.presence import ARENA, LOCKS, SOCKET
from chaos.campaign import relay
from chaos.campaign.wire import Order
from processes import ServerProcess, short_dir

ROOT = Path(__file__).parents[3]
MIB = 1 << 20
CAPACITY_MIB = 160  # less than all prompts need: chunks are evicted
TABLES_MIB = 16  # more than an arena's tables have
MOUNT_MIB = CAPACITY_MIB + 3 * TABLES_MIB  # an engine may hold a deleted arena's tables for a while


class RelayProcess:
    def __init__(self, front: Path, back: Path, seed: int) -> None:
        command = [sys.executable, "-m", relay.__name__, str(front / SOCKET), str(back / SOCKET), str(seed)]
        paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": paths},
        )
        assert self._hear() == relay.READY

    def obey(self, order: Order) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order).decode() + "\n")
        assert self._hear() == "ok"

    def close(self) -> None:
        with self._process:
            self._process.kill()

    def _hear(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


@dataclass
class Stage:
    cache: ServerProcess
    front: Path  # the relay's dir
    relay: RelayProcess
    base: list[str]  # the server's options that no upgrade changes
    mount: Path | None  # of the arena, if this user may mount
    deaths: int = 0  # of the server, by itself

    @property
    def arena(self) -> Path:
        return (self.mount or self.cache.runtime_dir) / ARENA

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    def revive(self) -> None:
        """A server that ended by itself: nobody is to see that, and the campaign goes on."""
        process = self.cache.process
        if process is not None and process.poll() is not None:
            self.deaths += 1
            self.cache.start()

    def strange_files(self) -> tuple[str, ...]:
        return () if self.mount is None else tuple(set(os.listdir(self.mount)) - {ARENA})

    def errors_of_the_server(self) -> int:
        words = self.cache.log.read_text(errors="replace")
        return words.count("Traceback") + words.count("internal error")


@contextlib.contextmanager
def stage(seed: int) -> Iterator[Stage]:
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(short_dir())
        mount = stack.enter_context(own_memory(MOUNT_MIB))
        back, front = place / "back", place / "front"
        base = ["--capacity", f"{CAPACITY_MIB}MiB", "--http", "off"]
        if mount is not None:
            base += ["--arena", str(mount / ARENA)]
        cache = stack.enter_context(ServerProcess(back, *base, environment={SWITCH: "1"}))
        front.mkdir(mode=0o700)
        (front / LOCKS).symlink_to(back / LOCKS)
        before = RelayProcess(front, back, seed)
        stack.callback(before.close)
        yield Stage(cache, front, before, base, mount)


@contextlib.contextmanager
def own_memory(mib: int) -> Iterator[Path | None]:
    """A file system in memory that can be filled without harm to others; None: this user may not mount."""
    path = Path(tempfile.mkdtemp(prefix="csm-"))
    mounting = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(path)]
    mounted = not subprocess.run(mounting, capture_output=True, check=False).returncode
    try:
        yield path if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(path)], check=True)
        path.rmdir()
