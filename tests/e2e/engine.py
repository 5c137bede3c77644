"""A real vLLM engine in a process of its own, told by JSON lines what to do.

usage: engine.py OPTIONS_AS_JSON        (vLLM's own, and `connector`: our extra config, or absent)
A line in is {"prompts": [[token, ...], ...], "tokens": n} or {"reset": true}; a line out is the answer.
"""

import json
import os
import sys

ANSWER = "@answer "


def main() -> None:
    options = json.loads(sys.argv[1])
    connector = options.pop("connector", None)
    if connector is not None:
        options["kv_transfer_config"] = {
            "kv_connector": "LMConnector",
            "kv_connector_module_path": "lmconnector.connector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": connector,
        }
    from vllm import LLM, SamplingParams

    engine = LLM(**{"enforce_eager": True, "max_model_len": 4096, "block_size": 32, "seed": 0, **options})
    answer({"ready": os.getpid()})
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("reset"):
            answer({"reset": engine.reset_prefix_cache()})
            continue
        sampling = SamplingParams(max_tokens=order["tokens"], temperature=0, logprobs=1, ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt in order["prompts"]]
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


def answer(value: dict) -> None:
    print(ANSWER + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
