"""The order of it: a server that runs, or one for the time of the benchmark; the echo; what is measured."""

import contextlib
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from lmconnector import __version__
from lmconnector.bench import rows, trips
from lmconnector.bench.rows import Report, Row
from lmconnector.doctor import place
from lmconnector.doctor.findings import Verdict
from lmconnector.doctor.visit import RefusedError, Visit
from lmconnector.errors import RegistrationError, UnavailableError

OWN_CAPACITY = "1GiB"
NEEDED_BYTES = 64 << 20
OWN_DIRS = "/dev/shm"  # noqa: S108
START_S = 10.0
LOOK_S = 0.02
EXIT_FAILED = 1


def run(runtime_dir: Path | None, *, json: bool) -> int:
    """-> the exit code.  Without a runtime dir it starts a server of its own, and ends it."""
    with contextlib.ExitStack() as ending:
        scratch = Path(
            ending.enter_context(tempfile.TemporaryDirectory(prefix="lmconnector-bench-", dir=OWN_DIRS))
        )
        echo_path = scratch / "echo.sock"
        ending.enter_context(_process("-m", "lmconnector.bench.echo", str(echo_path)))
        try:
            if runtime_dir is None:
                runtime_dir = scratch / "server"
                options = ["--dir", str(runtime_dir), "--capacity", OWN_CAPACITY, "--http", "off"]
                ending.enter_context(_process("-m", "cache_server", "run", *options, "--log-level", "error"))
                _wait_for(runtime_dir)
                server = f"one of its own with {OWN_CAPACITY}"
            else:
                server = str(runtime_dir)
            _report(server, _rows(runtime_dir, echo_path), json=json)
        except (UnavailableError, RegistrationError, RefusedError) as error:
            print(f"lmconnector: bench: {error}; `lmconnector doctor` looks closer", file=sys.stderr)
            return EXIT_FAILED
    return 0


def _report(server: str, measured: Iterator[Row], *, json: bool) -> None:
    machine = f"{_cpu()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
    found: list[Row] = []
    if not json:
        print(f"machine  {machine}\nserver   {server}\n")
    for row in measured:
        found.append(row)
        if not json:
            print(row, flush=True)
    if json:
        print(rows.as_json(Report(__version__, machine, server, found)))


def _rows(runtime_dir: Path, echo_path: Path) -> Iterator[Row]:
    with Visit(runtime_dir) as visit:
        visit.ping()
        yield from trips.rows(visit, runtime_dir, echo_path)
        if importlib.util.find_spec("torch") is None:
            print("lmconnector: bench: copies are left out: torch is not installed here", file=sys.stderr)
            return
        from lmconnector.bench import copies  # noqa: PLC0415  needs torch

        yield from copies.rows(visit, visit.register(trips.PART_BYTES))


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[None]:
    process = subprocess.Popen([sys.executable, *arguments], stdin=subprocess.DEVNULL)  # noqa: S603  ourselves
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _wait_for(runtime_dir: Path) -> None:
    """Until it listens, and has memory for what is copied; raises `UnavailableError`."""
    end_s = time.monotonic() + START_S
    why = ""
    while time.monotonic() < end_s:
        finding = place.server_socket(runtime_dir)
        if finding.verdict is Verdict.OK:
            with contextlib.suppress(RefusedError, UnavailableError), Visit(runtime_dir) as visit:
                visit.register(trips.PART_BYTES)
                visit.reserve(NEEDED_BYTES // trips.PART_BYTES)
                return
        why = finding.found
        threading.Event().wait(LOOK_S)
    raise UnavailableError(f"the server started for this did not come up within {START_S:.0f} s: {why}")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")
