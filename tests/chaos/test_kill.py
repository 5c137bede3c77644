"""Servers and engines killed at random moments: nothing committed is lost, nothing half-written is read."""

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache_server.protocol.slots import SlotState, read_entry, read_header
from cache_server.session import Session
from chaos import writer as writing
from processes import ServerProcess, eventually, server

pytestmark = pytest.mark.chaos

ROUNDS = 50
WRITERS = 3
RECLAIM_DEADLINE_S = 2.0


class Writers:
    """Writer processes and what they say was committed."""

    def __init__(self, runtime_dir: Path, ledgers: Path) -> None:
        self.runtime_dir = runtime_dir
        self.ledgers = ledgers
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, engine: str, seed: int, *options: str) -> subprocess.Popen[str]:
        ledger = self.ledgers / engine
        command = [sys.executable, writing.__file__, str(self.runtime_dir), engine, str(seed), str(ledger)]
        process = subprocess.Popen(
            [*command, *options],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.processes.append(process)
        return process

    def check_alive(self) -> None:
        for process in self.processes:
            assert process.poll() is None, process.stdout.read()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()
        self.processes.clear()

    def committed(self) -> dict[str, int]:
        """The greatest depth acknowledged of each chain."""
        chains: dict[str, int] = {}
        for ledger in self.ledgers.iterdir():
            for name, depth in self.committed_by(ledger.name).items():
                chains[name] = max(chains.get(name, 0), depth)
        return chains

    def committed_by(self, engine: str) -> dict[str, int]:
        *whole, _torn = (self.ledgers / engine).read_text().split("\n")
        chains: dict[str, int] = {}
        for name, depth in map(str.split, whole):
            chains[name] = max(chains.get(name, 0), int(depth))
        return chains


def check_all_there(reader: Session, chains: dict[str, int]) -> None:
    for name, depth in chains.items():
        hashes = writing.chain(name, depth)
        loaded = reader.load(hashes)
        assert len(loaded) == depth, f"{name}: {len(loaded)} of {depth} chunks after the restart"
        for hash_, content in zip(hashes, loaded, strict=True):
            assert content == writing.content(hash_), f"{name}: other bytes"


@pytest.mark.timeout(600)
def test_fifty_kills_of_the_server_under_load(tmp_path: Path) -> None:
    rng = random.Random(20)
    with server("--capacity", "1GiB", "--stock-percent", "5") as process:
        writers = Writers(process.runtime_dir, tmp_path)
        try:
            for number in range(WRITERS):
                writers.start(f"writer-{number}", number)
            checked: dict[str, int] = {}
            for _ in range(ROUNDS):
                time.sleep(rng.uniform(0.02, 0.4))
                process.kill()
                before = writers.committed()
                process.restart()
                status = process.check_conservation()
                assert status.chunks.evicted == 0, "the arena is too small for this test"
                new = {name: depth for name, depth in before.items() if checked.get(name, 0) < depth}
                reader = writing.open_session(process.runtime_dir, "reader")
                check_all_there(reader, new)
                reader.close()
                checked |= new
                writers.check_alive()
            assert len(checked) > 10 * ROUNDS, "the writers hardly wrote"
            writers.kill()
            eventually(lambda: reserved(process) == 0, "the dead writers' slots came back")
            reader = writing.open_session(process.runtime_dir, "reader")
            check_all_there(reader, writers.committed())
            status = process.check_conservation()
            print(f"{ROUNDS} kills, {len(checked)} chains, {status.chunks.stored} chunks, none lost")
            reader.close()
        finally:
            writers.kill()


def reserved(process: ServerProcess) -> int:
    arena = process.status().arena
    return arena.stocked_bytes + arena.quarantined_bytes


def test_engines_killed_in_mid_write_give_everything_back(tmp_path: Path) -> None:
    rng = random.Random(21)
    with server("--silent-after", "1s") as process:
        writers = Writers(process.runtime_dir, tmp_path)
        slowest_s = 0.0
        try:
            for number in range(10):
                for part in range(2):
                    writers.start(f"w{number}-{part}", 2 * number + part)
                holder = writers.start(f"h{number}", number, "--hold")
                holder.stdout.readline()
                assert reserved(process) > 0
                time.sleep(rng.uniform(0.0, 0.3))
                writers.kill()
                died_s = time.monotonic()
                eventually(lambda: reserved(process) == 0, "all slots came back", RECLAIM_DEADLINE_S)
                slowest_s = max(slowest_s, time.monotonic() - died_s)
                status = process.check_conservation()
                assert not status.worker_rows, status.worker_rows
                assert status.leases.outstanding == 0
            assert not list((process.runtime_dir / "locks").iterdir())
            print(f"a dead engine's slots came back after {slowest_s:.2f} s at most")
            reader = writing.open_session(process.runtime_dir, "reader")
            for name, depth in writers.committed().items():
                hashes = writing.chain(name, depth)
                for hash_, content in zip(hashes, reader.load(hashes), strict=False):
                    assert content == writing.content(hash_)
            reader.close()
        finally:
            writers.kill()


@pytest.mark.parametrize("server_dies_too", [False, True])
def test_a_stopped_writer_keeps_its_slot(tmp_path: Path, server_dies_too: bool) -> None:
    """SIGSTOP in mid-write, then such a lack of space that every slot that can be had is handed out."""
    with server("--capacity", "16MiB", "--silent-after", "1s", "--reclaim-grace", "0ms") as process:
        writers = Writers(process.runtime_dir, tmp_path)
        try:
            holder = writers.start("holder", 1, "--hold")
            number, generation = map(int, holder.stdout.readline().split())
            holder.send_signal(signal.SIGSTOP)
            if server_dies_too:
                process.restart()
            eventually(lambda: process.status().arena.quarantined_bytes > 0, "in quarantine")
            for seed in range(2):
                writers.start(f"busy-{seed}", seed)
            eventually(lambda: process.status().chunks.evicted > 1000, "slots are in demand", 60.0)
            entry = entry_of(process.runtime_dir / "arena", number)
            assert (entry.state, entry.generation) == (SlotState.RESERVED, generation)
            holder.send_signal(signal.SIGCONT)
            if not server_dies_too:
                while holder.poll() is None:  # let it go on, slot by slot
                    holder.stdin.write("\n")
                    holder.stdin.flush()
                    if not holder.stdout.readline():
                        break
                assert holder.wait(10) == 0, holder.stdout.read()
                name, depth = next(iter(writers.committed_by("holder").items()))
                reader = writing.open_session(process.runtime_dir, "reader")
                hashes = writing.chain(name, depth)
                for hash_, content in zip(hashes, reader.load(hashes), strict=False):
                    assert content == writing.content(hash_)
                reader.close()
            process.check_conservation()
            writers.processes = [writer for writer in writers.processes if writer is not holder]
            holder.kill()
            holder.communicate()
            writers.check_alive()
        finally:
            writers.kill()


def entry_of(arena: Path, number: int):
    """The slot's entry as a client sees it in the file."""
    with arena.open("rb") as file:
        header = file.read(4096)
        geometry, _ = read_header(header)
        file.seek(0)
        return read_entry(memoryview(file.read(geometry.data_at)), geometry, number)


def test_slots_of_a_living_engine_stay_its_own_whatever_becomes_of_the_presence_files() -> None:
    """It may be about to write into them: it sleeps, or is slow."""
    with server("--canary-idle", "off") as process:
        session = writing.open_session(process.runtime_dir, "engine")
        session.reserve(4)
        held = reserved(process)
        assert held
        shutil.rmtree(process.runtime_dir / "locks")
        time.sleep(2.0)
        assert reserved(process) == held
        assert [row.state for row in process.status().worker_rows] == ["ready"]
        process.restart()
        time.sleep(2.0)
        assert reserved(process) == held, "a server that has never seen the file has no proof either"
        session.abandon()
        session = writing.open_session(process.runtime_dir, "engine")
        assert session.abort_all() == 4
        assert reserved(process) == 0
        session.close()
