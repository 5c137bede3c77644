"""A real vLLM engine in a process of its own, told by JSON lines what to do.

usage: engine.py OPTIONS_AS_JSON        (vLLM's own; `connector`: our extra config, or absent; `told_by`;
                        and `cache_latents`)
A line in is {"prompts": [[token, ...], ...], "tokens": n, "salt": "" or a cache salt}, {"reset": true,
"connector": false} or {"metric": name, "labels": {}}; a line out is the answer.
"""

import json
import os
import sys
from typing import TYPE_CHECKING

from bench.engine import Answers

if TYPE_CHECKING:
    from vllm import LLM

# In float32 no two tokens are so close that it matters with whom a request shares its step.
DTYPE = "float32"
OPTIONS = {"dtype": DTYPE, "enforce_eager": True, "max_model_len": 4096, "block_size": 32, "seed": 0}
MODULE, NAME, MULTI = TOLD_BY = ("module path", "name", "multi")


def transfer_config(connector: dict, told_by: str = MODULE) -> dict:
    """By its module path, by its name alone, or as the one member of MultiConnector."""
    ours = {"kv_connector": "LMConnector", "kv_role": "kv_both", "kv_connector_extra_config": connector}
    if told_by == NAME:
        return ours
    if told_by == MODULE:
        return {**ours, "kv_connector_module_path": "lmconnector.connector"}
    assert told_by in TOLD_BY
    several = {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    return {**several, "kv_connector_extra_config": {"connectors": [ours]}}


def main() -> None:
    answer = Answers()
    options = json.loads(sys.argv[1])
    connector, told_by = options.pop("connector", None), options.pop("told_by", MODULE)
    if connector is not None:
        options["kv_transfer_config"] = transfer_config(connector, told_by)
    if options.pop("cache_latents", False):
        cache_latents()
    from vllm import LLM

    engine = LLM(**{**OPTIONS, **options})
    answer({"ready": os.getpid()})
    serve(engine, answer)
    engine.llm_engine.engine_core.shutdown()
    os._exit(0)  # what was imported takes seconds to be taken down


def cache_latents() -> None:
    """vLLM has no prefix cache of its own for latent attention on a CPU: what it computes after a cached
    prefix is not quite what it computes after a new one.  In this process: another one would ask anew."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def check_and_cache(config) -> None:
        check(config)
        config.cache_config.enable_prefix_caching = config.scheduler_config.enable_chunked_prefill = True

    CpuPlatform.check_and_update_config = staticmethod(check_and_cache)


def serve(engine: "LLM", answer: "Answers") -> None:
    from vllm import SamplingParams

    for line in sys.stdin:
        order = json.loads(line)
        if order.get("reset"):
            answer({"reset": engine.reset_prefix_cache(reset_connector=order["connector"])})
            continue
        if name := order.get("metric"):
            found = [metric for metric in engine.get_metrics() if metric.name == name]
            wanted = order["labels"].items()
            answer({"metric": sum(one.value for one in found if wanted <= one.labels.items())})
            continue
        sampling = SamplingParams(max_tokens=order["tokens"], temperature=0, logprobs=1, ignore_eos=True)
        salt = {"cache_salt": order["salt"]} if order["salt"] else {}
        prompts = [{"prompt_token_ids": prompt, **salt} for prompt in order["prompts"]]
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        answer(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "logprobs": [
                    [round(next(iter(step.values())).logprob, 4) for step in output.outputs[0].logprobs]
                    for output in outputs
                ],
                "cached": [output.num_cached_tokens for output in outputs],
                "reasons": [output.outputs[0].finish_reason for output in outputs],
            }
        )


if __name__ == "__main__":
    main()
