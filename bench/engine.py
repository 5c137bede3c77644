"""A real vLLM in a process of its own, told by JSON lines what to do.

usage: engine.py OPTIONS_AS_JSON        (vLLM's own)
A line in is {"prompts": [[token, ...], ...], "tokens": n} or {"reset": true}; a line out is the answer.  It
imports nothing but vLLM, so that it runs in the environment of any peer.
"""

import json
import os
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker

ANSWER = "@answer "
STAMPS_FOLDER = "BENCH_STAMPS"  # the variable that names the folder of `bench.stamps`


def main() -> None:
    answer = Answers()
    from vllm import LLM  # noqa: PLC0415  who starts this process needs no vLLM

    llm = LLM(**json.loads(sys.argv[1]))
    llm.collective_rpc(touch)
    answer({"ready": os.getpid()})
    for number, line in enumerate(sys.stdin):
        order = json.loads(line)
        answer({"reset": llm.reset_prefix_cache()} if order.get("reset") else asked(llm, number, order))
    llm.llm_engine.engine_core.shutdown()
    os._exit(0)  # what was imported takes seconds to be taken down


def touch(worker: "Worker") -> None:
    """An engine that has run for a while has all of its KV cache; in a fresh one the first use of each page
    costs more than to copy it."""
    for cache in worker.model_runner.kv_caches:
        cache.zero_()


def asked(llm: "LLM", number: int, order: dict) -> dict:
    """All prompts come at once; times are those from then on."""
    from vllm import SamplingParams  # noqa: PLC0415

    engine, prompts = llm.llm_engine, order["prompts"]
    sampling = SamplingParams(max_tokens=order["tokens"], temperature=0, ignore_eos=True)
    first_ns: dict[int, int] = {}
    cached: dict[int, int] = {}
    tokens: dict[int, list[int]] = {}
    began_ns = time.monotonic_ns()
    for at, prompt in enumerate(prompts):
        engine.add_request(f"{number}-{at}", {"prompt_token_ids": prompt}, sampling)
    while engine.has_unfinished_requests():
        outputs = engine.step()
        now_ns = time.monotonic_ns()
        for output in outputs:
            at = int(output.request_id.partition("-")[2])
            tokens[at] = list(output.outputs[0].token_ids)
            cached[at] = output.num_cached_tokens or 0
            if tokens[at]:
                first_ns.setdefault(at, now_ns)
    each = range(len(prompts))
    return {
        "began_ns": began_ns,
        "first_ms": [(first_ns[at] - began_ns) / 1e6 for at in each],
        "took_ms": (time.monotonic_ns() - began_ns) / 1e6,
        "cached": [cached[at] for at in each],
        "tokens": [tokens[at] for at in each],
    }


class Answers:
    """The engine's other processes print as well, and would do it in the midst of an answer."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def __call__(self, value: dict) -> None:
        self._out.write(ANSWER + json.dumps(value) + "\n")


if __name__ == "__main__":
    main()
