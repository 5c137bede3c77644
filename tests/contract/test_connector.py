"""The connector as vLLM makes it: when its heartbeats begin, and what it says at the start."""

import contextlib
import importlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip(
    "vllm", reason="the engine is not installed: `make setup` brings it", exc_type=ImportError
)

with warnings.catch_warnings():  # of its own deprecations, while it is imported
    warnings.simplefilter("ignore")
    importlib.import_module("lmconnector.connector")
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole

from cache_server.protocol.presence import LOCKS
from engine_side import Prompt
from lmconnector.connector import LMConnector
from processes import ServerProcess, eventually, server, short_dir
from vllm_side import full, kv_caches, kv_config, vllm_config, with_connector


class Lines(logging.Handler):
    """What the connector logs, however the engine has set up logging."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append((record.levelname, record.getMessage()))

    def of(self, begin: str) -> list[tuple[str, str]]:
        return [(level, line) for level, line in self.told if line.startswith(begin)]


@pytest.fixture
def lines() -> Iterator[Lines]:
    logger, handler = logging.getLogger("vllm.lmconnector"), Lines()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


@contextlib.contextmanager
def scheduler_of(
    runtime_dir: Path, config: SimpleNamespace | None = None, engine_id: str | None = None
) -> Iterator[LMConnector]:
    engine = with_connector(config or vllm_config(), engine_id, dir=str(runtime_dir), chunk_tokens=64)
    connector = LMConnector(engine, KVConnectorRole.SCHEDULER, kv_config(full()))
    try:
        yield connector
    finally:
        connector.shutdown()


@pytest.fixture
def process() -> Iterator[ServerProcess]:
    with server("--canary-idle", "off") as running:
        yield running


def beats() -> int:
    return [thread.name for thread in threading.enumerate()].count("lmconnector-heartbeat")


def rows(process: ServerProcess) -> list[tuple[str, str, bool]]:
    return [(row.role, row.state, row.pings > 0) for row in process.status().worker_rows]


def test_a_workers_heartbeat_begins_when_its_warm_up_is_over(process: ServerProcess) -> None:
    config, caches, _ = kv_caches()
    engine = with_connector(vllm_config(), dir=str(process.runtime_dir), chunk_tokens=64)
    connector = LMConnector(engine, KVConnectorRole.WORKER, config)
    connector.register_kv_caches(caches)
    assert rows(process) == [("worker", "warming", False)]
    assert beats() == 0
    assert connector.get_handshake_metadata() is None
    eventually(lambda: rows(process) == [("worker", "ready", True)], "pings")
    assert beats() == 1
    connector.shutdown()
    assert (rows(process), beats()) == ([], 0)


def test_a_workers_heartbeat_begins_with_its_first_step_at_the_latest(process: ServerProcess) -> None:
    config, caches, _ = kv_caches()
    engine = with_connector(vllm_config(), dir=str(process.runtime_dir), chunk_tokens=64)
    connector = LMConnector(engine, KVConnectorRole.WORKER, config)
    connector.register_kv_caches(caches)
    connector.start_load_kv(None)
    eventually(lambda: rows(process) == [("worker", "ready", True)], "pings")
    connector.shutdown()


def test_a_side_that_fails_to_close_keeps_the_server_in_the_picture(
    process: ServerProcess, lines: Lines
) -> None:
    """It is told that we leave, and sees by our lock that a copy may still write."""
    config, caches, _ = kv_caches()
    engine = with_connector(vllm_config(), dir=str(process.runtime_dir), chunk_tokens=64)
    connector = LMConnector(engine, KVConnectorRole.WORKER, config)
    connector.register_kv_caches(caches)
    connector.get_handshake_metadata()
    eventually(lambda: rows(process) == [("worker", "ready", True)], "pings")
    transfer, side = connector._worker._transfer, connector._worker
    side.close = lambda: 1 // 0
    connector.shutdown()
    assert (rows(process), beats()) == ([], 0)
    assert len(list((process.runtime_dir / LOCKS).iterdir())) == 1
    assert [level for level, _ in lines.of("hook: shutdown failed")] == ["ERROR"]
    assert transfer.close()


def test_of_two_engines_with_one_engine_id_the_second_is_told_what_to_do(
    process: ServerProcess, lines: Lines
) -> None:
    """As a copied configuration gives it; also where only the first one's worker has registered so far."""
    config, caches, _ = kv_caches()
    first, second = vllm_config(), vllm_config()
    second.instance_id = "2"
    engine = with_connector(first, dir=str(process.runtime_dir), chunk_tokens=64)
    worker = LMConnector(engine, KVConnectorRole.WORKER, config)
    worker.register_kv_caches(caches)
    name = engine.kv_transfer_config.engine_id
    with scheduler_of(process.runtime_dir, first, name) as scheduler:
        scheduler.set_xfer_handshake_metadata_pp_aware({})
        eventually(lambda: len(rows(process)) == 2, "the first one's scheduler")
    with scheduler_of(process.runtime_dir, second, name) as scheduler:
        scheduler.set_xfer_handshake_metadata_pp_aware({})
        ((level, line),) = eventually(lambda: lines.of("health: recovering -> degraded"), "a warning")
        assert level == "WARNING"
        assert f"engine {name}, worker 0 is process {os.getpid()} and lives" in line
        assert "give each engine an engine_id of its own" in line
    worker.shutdown()


@pytest.mark.parametrize("when", ["the workers have warmed up", "the first request comes"])
def test_a_schedulers_heartbeat_begins_when_it_is_of_use(process: ServerProcess, when: str) -> None:
    with scheduler_of(process.runtime_dir) as connector:
        assert (rows(process), beats()) == ([], 0)
        if when == "the first request comes":
            connector.on_new_request(Prompt("first", 64))
        else:
            connector.set_xfer_handshake_metadata_pp_aware({})
        eventually(lambda: rows(process) == [("scheduler", "ready", True)], "pings")
    assert (rows(process), beats()) == ([], 0)


def test_without_a_server_nothing_is_said_before_it_is_needed_and_then_once(lines: Lines) -> None:
    with short_dir() as directory, scheduler_of(directory / "absent") as connector:
        assert lines.of("health") == []
        prompt = Prompt("first", 64)
        connector.on_new_request(prompt)
        assert connector.get_num_new_matched_tokens(prompt, 0) == (0, False)
        eventually(lambda: lines.of("health: recovering -> degraded"), "a warning")
        assert [level for level, _ in lines.told].count("WARNING") == 1


def test_the_options_are_said_once_with_what_was_set(lines: Lines) -> None:
    with short_dir() as directory, scheduler_of(directory):
        config, _, _ = kv_caches()
        worker = with_connector(vllm_config(), dir=str(directory), chunk_tokens=64)
        LMConnector(worker, KVConnectorRole.WORKER, config).shutdown()
        ((level, line),) = lines.of("options: ")
        assert level == "INFO"
        assert f"dir={directory} (default /dev/shm/cache-server), chunk_tokens=64 (default 256), " in line
        assert line.count("(default ") == 2
        assert line.endswith("; a hung server is left after 2600 ms at most")


def test_vllm_is_told_to_recompute_and_the_user_that_it_was(lines: Lines) -> None:
    with short_dir() as directory:
        config = vllm_config()
        with scheduler_of(directory, config):
            assert config.kv_transfer_config.kv_load_failure_policy == "recompute"
            assert [level for level, _ in lines.of("connector: kv_load_failure_policy set to recompute")] == [
                "INFO"
            ]


@pytest.mark.parametrize(("algorithm", "warnings_told"), [("xxhash", 1), ("sha256", 0)])
def test_hashes_that_nobody_else_gets_are_warned_of(
    lines: Lines, monkeypatch: pytest.MonkeyPatch, algorithm: str, warnings_told: int
) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    config = vllm_config(cache_prefix_caching_hash_algo=algorithm)
    with short_dir() as directory, scheduler_of(directory, config):
        told = lines.of(f"connector: block hashes by {algorithm} begin with a seed that vLLM draws anew")
        assert [level for level, _ in told] == ["WARNING"] * warnings_told


def test_a_model_that_can_not_be_cached_is_served_without_and_its_reason_is_said(lines: Lines) -> None:
    with short_dir() as directory:
        config = vllm_config(parallel_decode_context_parallel_size=2)
        with scheduler_of(directory, config) as connector:
            assert lines.told == [
                (
                    "WARNING",
                    "connector: serving without the cache: decode_context_parallel_size = 2: "
                    "context parallelism is not supported",
                )
            ]
            prompt = Prompt("first", 64)
            connector.on_new_request(prompt)
            assert connector.get_num_new_matched_tokens(prompt, 0) == (0, False)
            assert beats() == 0
