"""Connectors that write down when vLLM calls them: where the time of a request goes.

vLLM loads `Lmconnector`, `Lmcache` or `Nothing` from here by name.  Each call is one line "NAME BEGIN END" in
`$BENCH_STAMPS/<process id>`, in ns of the machine's monotonic clock, which all processes share.
"""

import functools
import os
import time
from collections.abc import Callable
from pathlib import Path

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata

from bench.engine import STAMPS_FOLDER

HOOKS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "bind_connector_metadata",
    "start_load_kv",
    "wait_for_save",
    "get_transfer_results",
    "build_connector_worker_meta",
    "update_connector_output",
    "request_finished",
    "request_finished_all_groups",
)


@functools.cache
def _file() -> int:
    path = Path(os.environ[STAMPS_FOLDER]) / str(os.getpid())
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def _stamped(name: str, hook: Callable) -> Callable:
    @functools.wraps(hook)
    def stamped(*arguments: object, **named: object) -> object:
        began_ns = time.monotonic_ns()
        try:
            return hook(*arguments, **named)
        finally:
            os.write(_file(), f"{name} {began_ns} {time.monotonic_ns()}\n".encode())

    return stamped


class _Nothing(KVConnectorBase_V1):
    """Caches nothing: what vLLM itself takes, with the same calls around it."""

    def start_load_kv(self, forward_context: object, **kwargs: object) -> None: ...

    def wait_for_layer_load(self, layer_name: str) -> None: ...

    def save_kv_layer(
        self, layer_name: str, kv_layer: object, attn_metadata: object, **kwargs: object
    ) -> None: ...

    def wait_for_save(self) -> None: ...

    def get_num_new_matched_tokens(
        self, request: object, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: object, blocks: object, num_external_tokens: int) -> None: ...

    def build_connector_meta(self, scheduler_output: object) -> KVConnectorMetadata:
        return KVConnectorMetadata()


def _connector(name: str) -> type:
    if name == "Nothing":
        return _Nothing
    if name == "Lmconnector":
        from lmconnector.connector import LMConnector  # noqa: PLC0415  the peer's environment has none

        return LMConnector
    from vllm.distributed.kv_transfer.kv_connector.v1 import lmcache_mp_connector as peer  # noqa: PLC0415

    return peer.LMCacheMPConnector


@functools.cache
def __getattr__(name: str) -> type:
    if name not in ("Lmconnector", "Lmcache", "Nothing"):
        raise AttributeError(name)
    base = _connector(name)
    hooks = {hook: _stamped(hook, getattr(base, hook)) for hook in HOOKS if hasattr(base, hook)}
    return type(name, (base,), {**hooks, "__module__": __name__})
