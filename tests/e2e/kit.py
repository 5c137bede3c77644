"""Engines for end-to-end tests: started, asked, ended by pid."""

import contextlib
import json
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

from e2e import engine

START_DEADLINE_S = 240.0
ANSWER_DEADLINE_S = 120.0
STOP_DEADLINE_S = 20.0
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",  # with a connector vLLM would choose other threads: other roundings
}


@dataclass(frozen=True)
class Answer:
    tokens: list[list[int]]
    logprobs: list[list[float]]
    cached: list[int]
    reasons: list[str]
    took_s: float

    @property
    def said(self) -> tuple[list[list[int]], list[list[float]]]:
        return self.tokens, self.logprobs


class Engine:
    def __init__(self, log: Path, **options: object) -> None:
        root = Path(__file__).parents[2]
        paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        self.log = log
        self._err = log.open("ab")
        self.process = subprocess.Popen(
            [sys.executable, engine.__file__, json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._err, text=True, bufsize=1,
            start_new_session=True, env={**os.environ, **ENVIRONMENT, "PYTHONPATH": paths},
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

    def ask(self, *prompts: list[int], tokens: int = 8) -> Answer:
        began_s = time.monotonic()
        self._say({"prompts": prompts, "tokens": tokens})
        reply = self._answer(ANSWER_DEADLINE_S)
        return Answer(**reply, took_s=time.monotonic() - began_s)

    def reset(self) -> None:
        self._say({"reset": True})
        assert self._answer(ANSWER_DEADLINE_S)["reset"]

    def words(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        """In good order, or vLLM leaves shared memory behind; then whatever is left of its session."""
        self.process.stdin.close()
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
                if line.startswith(engine.ANSWER):
                    return json.loads(line.removeprefix(engine.ANSWER))
                self._err.write(line.encode())
                self._err.flush()
        raise AssertionError(f"no answer within {deadline_s} s:\n{self.words()[-4000:]}")


@contextlib.contextmanager
def engines(*started: Engine) -> Iterator[tuple[Engine, ...]]:
    """They start at the same time."""
    try:
        for one in started:
            one.started()
        yield started
    finally:
        for one in started:
            one.close()


def prompt(seed: int, tokens: int = 1000) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 1000) for _ in range(tokens)]
