"""Engines for end-to-end tests: started, asked, ended by pid."""

import contextlib
import json
import mmap
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.engine import ANSWER
from cache_server.protocol.slots import SlotState, read_entry, read_header, write_entry
from e2e import engine
from processes import ServerProcess, eventually

START_DEADLINE_S = 480.0
ANSWER_DEADLINE_S = 120.0
STOP_DEADLINE_S = 30.0
CHUNK_TOKENS = 128
PROMPT_TOKENS = 1000
HIT = PROMPT_TOKENS // CHUNK_TOKENS * CHUNK_TOKENS  # of such a prompt
LATENT_BACKEND = "CPU_MLA"  # that for AMX is not for every machine, nor for float32
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "TORCH_COMPILE_DISABLE": "1",  # vLLM compiles the ranks of logprobs, in 10 s, at the first request
}

Said = tuple[list[int], list[float]]  # tokens and their logprobs


@dataclass(frozen=True)
class Answer:
    tokens: list[list[int]]
    logprobs: list[list[float]]
    cached: list[int]
    reasons: list[str]
    took_s: float

    @property
    def said(self) -> list[Said]:
        """For each prompt."""
        return list(zip(self.tokens, self.logprobs, strict=True))


def environment(cores: str) -> dict[str, str]:
    """`cores`: one for each rank, "0" or "0|1".  What vLLM chooses depends on the connector."""
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **ENVIRONMENT, "VLLM_CPU_OMP_THREADS_BIND": cores, "PYTHONPATH": paths}


def connector(runtime_dir: Path, **options: object) -> dict[str, object]:
    """Patient: on a machine this busy the server may have to wait for a core."""
    beat = {"heartbeat_interval_s": 1.0, "heartbeat_timeout_s": 0.8, "lookup_deadline_ms": 1_000}
    return {"dir": str(runtime_dir), "chunk_tokens": CHUNK_TOKENS, **beat, **options}


class Engine:
    def __init__(self, log: Path, *, cores: str = "0", **options: object) -> None:
        """`options`: vLLM's own, `connector` and `told_by`."""
        self.log = log
        self._err = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, engine.__file__, json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._err, text=True, bufsize=1,
            start_new_session=True, env=environment(cores),
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def started(self) -> "Engine":
        assert self._answer(START_DEADLINE_S)["ready"]
        return self

    def ask(self, *prompts: list[int], tokens: int = 8, salt: str = "") -> Answer:
        """All of them in one call: what fits goes into one step."""
        began_s = time.monotonic()
        self.begin(*prompts, tokens=tokens, salt=salt)
        return self.end(began_s)

    def begin(self, *prompts: list[int], tokens: int = 8, salt: str = "") -> None:
        """Does not wait for the answer: `end` does."""
        self._say({"prompts": prompts, "tokens": tokens, "salt": salt})

    def end(self, began_s: float = 0.0) -> Answer:
        reply = self._answer(ANSWER_DEADLINE_S)
        return Answer(**reply, took_s=time.monotonic() - began_s)

    def reset(self, *, connector: bool = False) -> None:
        """vLLM's own prefix cache, and with `connector` what ours holds; it fails while a block is held."""
        self._say({"reset": True, "connector": connector})
        assert self._answer(ANSWER_DEADLINE_S)["reset"]

    def metric(self, name: str, **labels: str) -> float:
        """One of vLLM's, summed over the other labels; the engine needs `disable_log_stats=False`."""
        self._say({"metric": f"vllm:{name}", "labels": labels})
        return self._answer(ANSWER_DEADLINE_S)["metric"]

    def words(self) -> str:
        return self.log.read_text(errors="replace")

    def leave(self) -> None:
        """Asks it to end, and does not wait."""
        self.process.stdin.close()

    def close(self) -> None:
        """In good order, or vLLM leaves shared memory behind; then whatever is left of its session."""
        self.leave()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_DEADLINE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        self._err.close()

    def _say(self, order: dict) -> None:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def _answer(self, deadline_s: float) -> dict:
        end_s = time.monotonic() + deadline_s
        while (left_s := end_s - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                line = self._lines.get(timeout=left_s)
                assert line, f"the engine ended:\n{self.words()[-4000:]}"
                if line.startswith(ANSWER):
                    return json.loads(line.removeprefix(ANSWER))
                self._err.write(line.encode())
                self._err.flush()
        raise AssertionError(f"no answer within {deadline_s} s:\n{self.words()[-4000:]}")


@contextlib.contextmanager
def engines(*started: Engine) -> Iterator[tuple[Engine, ...]]:
    """They start at the same time, and end at the same time."""
    try:
        for one in started:
            one.started()
        yield started
    finally:
        for one in started:
            one.leave()
        for one in started:
            one.close()


class Plain:
    """An engine that caches nothing, asked once for each prompt: what it says is right."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._began = False
        self._known: dict[tuple[int, tuple[int, ...]], Said] = {}

    def said(self, *prompts: list[int], tokens: int = 8) -> list[Said]:
        if not self._began:
            self.engine.started()
            self._began = True
        names = [(tokens, tuple(each)) for each in prompts]
        new = list(
            {name: each for name, each in zip(names, prompts, strict=True) if name not in self._known}.items()
        )
        if new:
            answer = self.engine.ask(*(each for _, each in new), tokens=tokens)
            self._known.update(zip((name for name, _ in new), answer.said, strict=True))
        return [self._known[name] for name in names]


def stored(process: ServerProcess, chunks: int) -> None:
    eventually(lambda: process.status().chunks.stored >= chunks, f"{chunks} chunks stored", 20.0)


def known(process: ServerProcess, workers: int = 1, engines: int = 1) -> None:
    """The engines' processes, and no others, have registered and may use the cache."""
    roles = ["scheduler"] * engines + ["worker"] * workers * engines

    def found() -> list[str]:
        return sorted(row.role for row in process.status().worker_rows if row.pings)

    eventually(lambda: found() == roles, f"{roles}", 30.0)


def hits_again(engine: Engine, tokens: list[int], right: Said) -> None:
    """Within a few heartbeats; and never a wrong token on the way."""

    def hit() -> bool:
        engine.reset()
        answer = engine.ask(tokens)
        assert answer.said == [right]
        return answer.cached == [HIT]

    eventually(hit, "hits again", 20.0)


def check_hits_and_wrong_bytes(engine: Engine, process: ServerProcess, plain: Engine | None = None) -> None:
    """A hit says what vLLM's own prefix hit says, and a `plain` engine without the connector; and wrong bytes
    would show.

    `plain` too has seen the prefix: on a CPU vLLM computes latent attention otherwise over a cached one than
    over a new one.  With a sliding window it does not hit there: of a prompt's windows vLLM keeps the last.
    """
    begun = prompt(1)
    asked = begun[:HIT] + prompt(2, 100)
    before = process.status().chunks.stored
    eventually(lambda: engine.ask(prompt(3)) and process.status().chunks.stored > before, "in use", 30.0)
    before = process.status().chunks.stored
    engine.ask(begun)  # once: what vLLM knows itself has left the window, and would be stored without it
    stored(process, before + HIT // CHUNK_TOKENS)
    local = engine.ask(asked)
    assert local.cached[0] > 0
    if plain is not None:
        plain.ask(begun)
        assert plain.ask(asked).said == local.said
    hits_again(engine, asked, local.said[0])
    assert "Traceback" not in engine.words()
    check_that_wrong_bytes_show(engine, process, asked, local.said[0])


def check_that_wrong_bytes_show(
    engine: Engine, process: ServerProcess, tokens: list[int], right: Said
) -> None:
    overwrite_all_chunks(process)

    def hit() -> Answer | None:
        engine.reset()
        answer = engine.ask(tokens)
        return answer if answer.cached == [HIT] else None

    wrong = eventually(hit, "a hit of wrong bytes", 20.0)
    assert wrong.said != [right], "this model does not look at its KV cache: this test proves nothing"


def overwrite_all_chunks(process: ServerProcess) -> None:
    """Other finite numbers, without the server's knowledge."""
    with (process.runtime_dir / "arena").open("r+b") as file:
        geometry, _ = read_header(file.read(4096))
        file.seek(geometry.data_at)
        for _ in range(geometry.slabs):
            file.write(b"\x3f" * geometry.slab_bytes)


def spoil_slot_table(process: ServerProcess) -> None:
    """All that is stored there is somebody else's now, and the server does not know it."""
    with (process.runtime_dir / "arena").open("r+b") as file, mmap.mmap(file.fileno(), 0) as arena:
        table = memoryview(arena)
        geometry, _ = read_header(table)
        for number in range(geometry.slabs * geometry.entries_per_slab):
            entry = read_entry(table, geometry, number)
            if entry is not None and entry.state == SlotState.COMMITTED:
                write_entry(table, geometry, number, entry._replace(generation=entry.generation + 10**9))
        table.release()


def prompt(seed: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 1000) for _ in range(tokens)]
