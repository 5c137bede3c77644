"""The vLLMs that are compared, each a process of its own, and the peers' servers beside ours."""

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import engine
from bench.kit import ROOT, clean_environment

START_DEADLINE_S = 240.0
ANSWER_DEADLINE_S = 600.0
STOP_DEADLINE_S = 10.0
KV_CACHE_GIB = 2
MODEL_LEN_MAX = 8_448
BLOCK_TOKENS = 32
# One thread on one core: what vLLM chooses by itself differs with a connector.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "LMCACHE_TRACK_USAGE": "false",
    "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # of `touch`, a function of ours
}


@dataclass(frozen=True)
class Variant:
    """A vLLM with one connector, or with none."""

    name: str
    transfer: dict[str, object] | None = None
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)

    def options(self, model: Path) -> dict[str, object]:
        common: dict[str, object] = {
            "model": str(model),
            "block_size": BLOCK_TOKENS,
            "max_model_len": MODEL_LEN_MAX,
            "max_num_batched_tokens": 8_192,
            "max_num_seqs": 16,
            "enforce_eager": True,
            "seed": 0,
        }
        return common if self.transfer is None else {**common, "kv_transfer_config": self.transfer}

    def surroundings(self) -> dict[str, str]:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        return {**clean_environment(), **ENVIRONMENT, "PYTHONPATH": paths, **self.environment}


def ours(runtime_dir: Path, **options: object) -> Variant:
    extra = {"dir": str(runtime_dir), **options}
    return Variant("lmconnector", transfer_config("LMConnector", "lmconnector.connector", extra))


def lmcache(python: str, port: int) -> Variant:
    """Over shared memory, copied by the engine: its fastest mode on a CPU."""
    extra = {
        "lmcache.mp.host": "tcp://127.0.0.1",
        "lmcache.mp.port": port,
        "lmcache.mp.mp_transfer_mode": "engine_driven",
    }
    return Variant("LMCache", transfer_config("LMCacheMPConnector", None, extra), python)


def example(folder: Path) -> Variant:
    """vLLM's own connector that runs on a CPU: a file for each layer of each prompt."""
    transfer = transfer_config("ExampleConnector", None, {"shared_storage_path": str(folder)})
    return Variant("ExampleConnector", transfer, environment={"VLLM_CPU_KVCACHE_SPACE": "1"})


def transfer_config(connector: str, module: str | None, extra: dict[str, object]) -> dict[str, object]:
    config = {"kv_connector": connector, "kv_role": "kv_both", "kv_connector_extra_config": extra}
    return config if module is None else {**config, "kv_connector_module_path": module}


class Engine:
    def __init__(self, variant: Variant, model: Path, log: Path) -> None:
        self.variant = variant
        self.log = log
        self._err = log.open("ab")
        self._process = subprocess.Popen(
            [variant.python, engine.__file__, json.dumps(variant.options(model))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._err,
            text=True,
            bufsize=1,
            start_new_session=True,
            env=variant.surroundings(),
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def started(self) -> "Engine":
        self._answer(START_DEADLINE_S)
        return self

    def ask(self, prompts: Sequence[Sequence[int]], tokens: int = 1) -> dict:
        return self._told({"prompts": prompts, "tokens": tokens})

    def reset(self) -> None:
        """vLLM's own prefix cache; it fails for as long as a connector holds a block."""
        end_s = time.monotonic() + START_DEADLINE_S
        while not self._told({"reset": True})["reset"]:
            if time.monotonic() > end_s:
                raise TimeoutError(f"{self.variant.name}: vLLM's blocks are held for ever")
            time.sleep(0.05)

    def close(self) -> None:
        """In good order, then whatever is left of its session."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        end_session(self._process)
        self._reader.join()
        self._err.close()

    def _told(self, order: dict) -> dict:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer(ANSWER_DEADLINE_S)

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")

    def _answer(self, deadline_s: float) -> dict:
        end_s = time.monotonic() + deadline_s
        while (left_s := end_s - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                line = self._lines.get(timeout=left_s)
                if not line:
                    raise RuntimeError(f"{self.variant.name} ended:\n{self._last_words()}")
                if line.startswith(engine.ANSWER):
                    return json.loads(line.removeprefix(engine.ANSWER))
                self._err.write(line.encode())
        raise TimeoutError(f"{self.variant.name}: no answer within {deadline_s} s:\n{self._last_words()}")

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-4_000:]


@contextlib.contextmanager
def lmcache_server(python: str, log: Path, gib: int) -> Iterator[int]:
    """-> its port"""
    port, http, prometheus = (free_port() for _ in range(3))
    words = [str(Path(python).with_name("lmcache")), "server", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--http-host", "127.0.0.1", "--http-port", str(http), "--prometheus-port", str(prometheus)]
    words += ["--l1-size-gb", str(gib), "--no-l1-use-lazy", "--eviction-policy", "LRU", "--chunk-size", "256"]
    words += ["--supported-transfer-mode", "auto", "--shm-name", f"bench_{port}"]
    around = {**clean_environment(), **ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as err:
        process = subprocess.Popen(words, stdout=err, stderr=err, start_new_session=True, env=around)
        try:
            wait_for_http(http, "/healthcheck", process, log)
            yield port
        finally:
            process.terminate()
            end_session(process)


def wait_for_http(port: int, path: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end_s = time.monotonic() + START_DEADLINE_S
    while time.monotonic() < end_s:
        if process.poll() is not None:
            raise RuntimeError(f"it ended:\n{log.read_text(errors='replace')[-4_000:]}")
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.2)
    raise TimeoutError(f"nothing serves on port {port} after {START_DEADLINE_S} s")


def why_no_peer(python: str | None) -> str:
    """Empty: LMCache can be run."""
    if python is None:
        return "no --peer-python was given"
    asked = subprocess.run(
        [python, "-c", "import lmcache, vllm"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**clean_environment(), **ENVIRONMENT},
    )
    return "" if asked.returncode == 0 else f"{python}: {asked.stderr.strip().splitlines()[-1]}"


def end_session(process: subprocess.Popen) -> None:
    """Waits for a while, then kills what is left of the process's session."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_DEADLINE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]
