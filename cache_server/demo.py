"""`make demo`: what a server is for, shown with a real one: store, look up, kill -9, warm restart, hit."""

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cache_server.client import Client, RefusedError, UnreachableError
from cache_server.protocol import messages as m
from cache_server.protocol.messages import Code
from cache_server.session import Session

CAPACITY = "512MiB"
CHUNK_BYTES = 2 << 20
CHUNKS = 16
DEADLINE_S = 10.0


def main() -> None:
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
    with tempfile.TemporaryDirectory(dir=parent, prefix="cache-server-demo-") as directory:
        runtime_dir = Path(directory)
        processes: list[subprocess.Popen[bytes]] = []
        try:
            _show(runtime_dir, processes)
        finally:
            for process in processes:
                process.kill()
                process.wait()


def _show(runtime_dir: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    hashes = [hashlib.sha256(b"chunk %d" % number).digest() for number in range(CHUNKS)]
    contents = [os.urandom(CHUNK_BYTES) for _ in hashes]
    stored_mib = CHUNKS * CHUNK_BYTES >> 20

    took_ms = _start(runtime_dir, processes)
    _say(f"a server with an arena of {CAPACITY} answers {took_ms} ms after its exec")
    engine = Session(runtime_dir, "demo", CHUNK_BYTES)
    _say("an engine has registered and mapped the arena")
    _say(f"before it stores anything, a LOOKUP finds {len(engine.load(hashes))} of {CHUNKS} chunks")
    began_s = time.perf_counter()
    _store_when_ready(engine, hashes, contents)
    _say(f"stored {CHUNKS} chunks, {stored_mib} MiB, in {_ms_since(began_s)} ms, first touch included")
    began_s = time.perf_counter()
    same = engine.load(hashes) == contents
    _say(f"loaded them again in {_ms_since(began_s)} ms: {'same bytes' if same else 'OTHER BYTES'}")

    processes[-1].send_signal(signal.SIGKILL)
    processes[-1].wait()
    engine.client.timeout_ms = 100
    try:
        engine.ping()
        sys.exit("a dead server answered")
    except UnreachableError:
        _say("killed the server with -9: the next request runs into its deadline, the engine goes on without")
    engine.client.timeout_ms = 2_000
    took_ms = _start(runtime_dir, processes)
    _say(f"a new server on the same runtime dir answers after {took_ms} ms")
    pong = engine.ping()
    _say(f"it does not know the engine (known={pong.known}, another boot): so the engine registers again")
    engine.register()
    began_s = time.perf_counter()
    again = engine.load(hashes)
    _say(f"a LOOKUP finds {len(again)} of {CHUNKS} chunks, loaded in {_ms_since(began_s)} ms")
    engine.close()
    if not same or again != contents:
        sys.exit("the bytes differ: this demo has failed")
    _say("same bytes: the restart was warm, nothing committed was lost")


def _start(runtime_dir: Path, processes: list[subprocess.Popen[bytes]]) -> int:
    """-> ms from exec to the first PONG"""
    command = [sys.executable, "-m", "cache_server", "run", "--dir", str(runtime_dir), "--capacity", CAPACITY]
    began_s = time.perf_counter()
    processes.append(subprocess.Popen([*command, "--http", "off", "--log-level", "error"]))  # noqa: S603
    while time.perf_counter() - began_s < DEADLINE_S:
        try:
            with Client(runtime_dir, timeout_ms=20) as client:
                client.ask(m.Ping(id=1), m.Pong)
            return _ms_since(began_s)
        except UnreachableError:
            if processes[-1].poll() is not None:
                break
    sys.exit("the server did not start; its words are above")


def _store_when_ready(engine: Session, hashes: list[bytes], contents: list[bytes]) -> None:
    """Right after the first start no memory has been populated yet; a real engine would drop the store."""
    began_s = time.perf_counter()
    while True:
        try:
            engine.store(hashes, contents)
            return
        except RefusedError as refusal:
            if refusal.code != Code.BUSY or time.perf_counter() - began_s > DEADLINE_S:
                raise


def _ms_since(began_s: float) -> int:
    return round((time.perf_counter() - began_s) * 1_000)


def _say(text: str) -> None:
    print(f"* {text}", flush=True)


if __name__ == "__main__":
    main()
