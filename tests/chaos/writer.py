"""An engine process for chaos tests: stores and loads chunks whose bytes follow from their hash.

usage: writer.py RUNTIME_DIR ENGINE SEED LEDGER [--hold]
Each acknowledged commit is a line `chain depth` in the ledger.  With --hold it stops in mid-write of one
reservation until it reads a line, so that a test can freeze or kill it there.
It ends by itself, with 3, only if it ever reads bytes that are not what was stored.
"""

import contextlib
import hashlib
import os
import random
import sys
import time
from pathlib import Path

from cache_server.client import RefusedError, UnreachableError
from cache_server.protocol.keys import SlotRef
from cache_server.protocol.messages import Code, Outcome
from cache_server.session import Session, StaleError

CHUNK_BYTES = 8192
NAMESPACE = b"chaos"
WRONG_BYTES = 3


def chain(name: str, depth: int) -> list[bytes]:
    hashes = [hashlib.sha256(name.encode()).digest()]
    while len(hashes) < depth:
        hashes.append(hashlib.sha256(hashes[-1]).digest())
    return hashes


def content(hash_: bytes) -> bytes:
    return hashlib.shake_128(hash_).digest(CHUNK_BYTES)


def open_session(runtime_dir: Path, engine: str) -> Session:
    return Session(runtime_dir, engine, CHUNK_BYTES, NAMESPACE)


class Writer:
    def __init__(self, runtime_dir: Path, engine: str, seed: int, ledger: Path) -> None:
        self.rng = random.Random(seed)
        self.session = open_session(runtime_dir, engine)
        self.session.client.timeout_ms = 200
        self.ledger = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.engine = engine
        self.count = 0

    def turn(self) -> None:
        try:
            if self.rng.random() < 0.5:
                self.store()
            else:
                self.load()
        except UnreachableError:
            pass  # the server is dead or new: go on
        except RefusedError as refusal:
            if refusal.code == Code.UNKNOWN_SESSION:
                self.reconnect()
            elif refusal.code not in (Code.BUSY, Code.NO_SPACE, Code.DRAINING):
                raise
        except StaleError:
            pass  # evicted under us: a miss

    def reconnect(self) -> None:
        with contextlib.suppress(UnreachableError):
            self.session.register()

    def chain_name(self) -> str:
        """Its own chains, and some that all writers share."""
        if self.rng.random() < 0.3:
            return f"shared-{self.rng.randrange(200)}"
        self.count += 1
        return f"{self.engine}-{self.count}"

    def store(self) -> None:
        name, depth = self.chain_name(), self.rng.randint(1, 8)
        hashes = chain(name, depth)
        slots = self.session.reserve(depth)
        try:
            self.write(slots, hashes)
            outcomes = self.session.commit(hashes, slots)
        except BaseException:
            self.give_back(slots)
            raise
        assert set(outcomes) <= {Outcome.STORED, Outcome.EXISTS}, outcomes
        os.write(self.ledger, f"{name} {depth}\n".encode())

    def give_back(self, slots: list[SlotRef]) -> None:
        """After a lost reply nobody knows whether the commit happened: ABORT returns what it left."""
        try:
            self.session.abort(slots)
        except (UnreachableError, RefusedError):
            self.unreturned = slots  # the server counts them as ours until this process ends

    def write(self, slots: list[SlotRef], hashes: list[bytes]) -> None:
        for slot, hash_ in zip(slots, hashes, strict=True):
            body = content(hash_)
            middle = self.rng.randrange(CHUNK_BYTES)
            self.session.write(slot, body[:middle])
            self.pause(slot)
            self.session.write(slot, body)

    def pause(self, slot: SlotRef) -> None:
        """Where a subclass stops."""

    def load(self) -> None:
        name = f"shared-{self.rng.randrange(200)}"
        hashes = chain(name, 8)
        for hash_, loaded in zip(hashes, self.session.load(hashes), strict=False):
            if loaded != content(hash_):
                print(f"wrong bytes in {name}", flush=True)
                os._exit(WRONG_BYTES)


class HoldingWriter(Writer):
    def pause(self, slot: SlotRef) -> None:
        print(slot.number, slot.generation, flush=True)
        sys.stdin.readline()


def main() -> None:
    runtime_dir, engine, seed, ledger = sys.argv[1:5]
    holding = sys.argv[5:] == ["--hold"]
    writer = (HoldingWriter if holding else Writer)(Path(runtime_dir), engine, int(seed), Path(ledger))
    if holding:
        writer.store()
        writer.session.close()
        return
    while True:
        writer.turn()
        time.sleep(writer.rng.uniform(0.0, 0.01))


if __name__ == "__main__":
    main()
