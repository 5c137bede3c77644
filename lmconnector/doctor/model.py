"""Whether a model's KV cache can be cached: built by vLLM itself, without weights.

usage: python -m lmconnector.doctor.model MODEL

It runs in a process of its own, as vLLM's start is not to be undone; the last line it prints is the answer.
Every layer is judged by the rule that the connector goes by; how vLLM groups the layers shows at its start.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter

from lmconnector.doctor.findings import Finding, fail, ok, warn

BUILD_S = 300
WORDS_MAX = 300


def layout(model: str) -> Finding:
    command = [sys.executable, "-m", "lmconnector.doctor.model", model]
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    advice = "start the engine: its log says `serving without the cache` and why, if it does"
    try:
        done = subprocess.run(  # noqa: S603  this very Python
            command, env={**os.environ, **quiet}, capture_output=True, text=True, timeout=BUILD_S, check=False
        )
    except subprocess.TimeoutExpired:
        return warn("layout", f"vLLM did not build {model} within {BUILD_S} s", advice)
    if done.returncode:
        words = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return warn("layout", f"vLLM could not build {model} without weights: {words[-WORDS_MAX:]}", advice)
    kinds, reason = json.loads(done.stdout.splitlines()[-1])
    if reason:
        return fail("layout", f"{model}: {kinds}: {reason}", "the engine serves, without the cache")
    return ok("layout", f"{model}: {kinds}: supported")


def main() -> None:
    """Prints the kinds of KV cache, and the reason why they are not supported or null."""
    import torch  # noqa: PLC0415
    from vllm.config import set_current_vllm_config  # noqa: PLC0415
    from vllm.distributed import (  # noqa: PLC0415
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase  # noqa: PLC0415
    from vllm.model_executor.model_loader.utils import initialize_model  # noqa: PLC0415
    from vllm.utils.torch_utils import set_default_torch_dtype  # noqa: PLC0415

    from lmconnector import layout as rules  # noqa: PLC0415
    from lmconnector.errors import UnsupportedError  # noqa: PLC0415

    config = EngineArgs(model=sys.argv[1], enforce_eager=True).create_engine_config()
    with tempfile.NamedTemporaryFile() as meeting, set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{meeting.name}", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        with torch.device("meta"), set_default_torch_dtype(config.model_config.dtype):
            initialize_model(vllm_config=config)
        layers = config.compilation_config.static_forward_context.values()
        specs = [layer.get_kv_cache_spec(config) for layer in layers if isinstance(layer, AttentionLayerBase)]
    specs = [spec for spec in specs if spec is not None]
    reason = None if specs else "the model has no KV cache"
    try:
        rules.check_parallelism(config)
        for spec in specs:
            rules.check_kind(spec)
    except UnsupportedError as error:
        reason = str(error)
    counts = Counter(type(spec).__name__ for spec in specs)
    kinds = ", ".join(f"{count} layers {kind}" for kind, count in counts.items()) or "no layer"
    print(json.dumps([kinds, reason]))


if __name__ == "__main__":
    main()
