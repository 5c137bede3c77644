"""Our hooks beside those of the vLLM that is installed, and what they answer when all behind them fails."""

import inspect
import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest
from prometheus_client import Counter as PromCounter
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from lmconnector import bridge, layout
from lmconnector.bridge import OutcomeMetadata, PlanMetadata, guarded
from lmconnector.connector import LMConnector
from lmconnector.health import Change, State, Timing
from lmconnector.heartbeat import Heartbeat
from lmconnector.metadata import Load, Outcome, Plan
from lmconnector.metrics import COUNTERS, Meter, PromMetrics, Stats

HOOKS = [
    name
    for name, value in vars(LMConnector).items()
    if (inspect.isfunction(value) or isinstance(value, classmethod))
    and not name.startswith("_")
    and (hasattr(KVConnectorBase_V1, name) or hasattr(SupportsHMA, name))
]
# They do nothing, or keep what they are given.
TRIVIAL = {"wait_for_layer_load", "save_kv_layer", "bind_gpu_block_pool", "build_kv_connector_stats"}


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_takes_what_vllm_gives(name: str) -> None:
    base = KVConnectorBase_V1 if hasattr(KVConnectorBase_V1, name) else SupportsHMA
    theirs = inspect.signature(getattr(base, name)).parameters
    ours = inspect.signature(getattr(LMConnector, name)).parameters
    assert list(ours) == list(theirs)


def test_the_hooks_that_we_need_are_there() -> None:
    assert not inspect.isabstract(LMConnector)
    assert issubclass(LMConnector, SupportsHMA)
    for name in (
        "get_transfer_results",
        "on_new_request",
        "build_connector_worker_meta",
        "has_pending_push_work",
    ):
        assert name in HOOKS, f"vLLM knows {name} no more"


class Broken:
    """Whatever is asked of it fails."""

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(f"{name} is broken")

    def __bool__(self) -> bool:
        raise RuntimeError("it can't even be asked whether it is there")


ANSWERS = {
    "get_num_new_matched_tokens": ((None, 0), (0, False)),
    "update_state_after_alloc": ((None, None, 5), None),
    "on_new_request": ((None,), None),
    "request_finished": ((None, []), (False, None)),
    "request_finished_all_groups": ((None, ([],)), (False, None)),
    "build_connector_meta": ((Broken(),), PlanMetadata(Plan())),
    "register_kv_caches": ((Broken(),), None),
    "build_prom_metrics": ((None, Broken(), [], {}), None),
    "update_connector_output": ((None,), None),
    "reset_cache": ((), False),
    "has_pending_push_work": ((), False),
    "start_load_kv": ((None,), None),
    "wait_for_save": ((), None),
    "get_transfer_results": ((set(),), KVConnectorTransferResults()),
    "get_block_ids_with_load_errors": ((), set()),
    "build_connector_worker_meta": ((), None),
    "get_handshake_metadata": ((), None),
    "set_xfer_handshake_metadata_pp_aware": (({},), None),
    "get_kv_connector_stats": ((), None),
    "shutdown": ((), None),
}


@pytest.mark.parametrize("name", sorted(ANSWERS))
def test_a_hook_whose_insides_fail_answers_with_a_miss(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "_told", Counter())
    connector = LMConnector.__new__(LMConnector)
    connector.errors = Counter()
    connector._scheduler = connector._worker = connector._member = connector._meter = Broken()
    connector._chunks = connector._kv_cache_config = connector._vllm_config = Broken()
    connector._connector_metadata = None
    connector._role = KVConnectorRole.WORKER
    arguments, answer = ANSWERS[name]
    caplog.set_level(logging.ERROR)
    assert getattr(connector, name)(*arguments) == answer
    assert caplog.records, "it is told of"
    assert all(record.exc_info for record in caplog.records)


def test_every_hook_is_seen_to_answer() -> None:
    assert set(ANSWERS) == set(HOOKS) - TRIVIAL


@pytest.mark.parametrize("broken", [Broken(), None, 5], ids=["broken", "nothing", "a number"])
def test_what_other_processes_tell_is_left_out_if_it_makes_no_sense(broken: object) -> None:
    outcome = OutcomeMetadata(Outcome(Counter({1: 1})))
    assert outcome.aggregate(broken) is outcome
    good, bad = Stats({"counts": {"loads": 1}, "health": {}}), Stats({"counts": broken, "health": broken})
    assert good.aggregate(bad) is good
    assert bad.reduce() == {}
    config = SimpleNamespace(kv_transfer_config=None)
    shown = PromMetrics(config, Kinds(), ["engine"], {0: ["0"]})
    shown.observe({"counts": broken, "health": broken})
    shown.observe({"counts": {"nobody_counts_this": 1}, "health": {}}, engine_idx=7)


def test_a_worker_whose_kv_caches_can_not_be_used_tells_its_loads_as_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The scheduler's side may have promised them all the same."""
    monkeypatch.setattr(layout, "chunk_layout", Broken())
    transfer = KVTransferConfig(kv_connector="LMConnector", kv_role="kv_both")
    vllm_config = SimpleNamespace(kv_transfer_config=transfer)
    connector = LMConnector(vllm_config, KVConnectorRole.WORKER, Broken())
    connector.register_kv_caches(Broken())
    loads = [Load(1, "before", at_once=True, pieces=[], lost=(3, 4)), Load(2, "beside", False, [], (5,))]
    connector.bind_connector_metadata(PlanMetadata(Plan(loads=loads)))
    connector.start_load_kv(None)
    connector.wait_for_save()
    results = connector.get_transfer_results(set())
    assert (results.finished_recving, results.failed_recving) == ({"beside"}, {"beside"})
    assert connector.get_block_ids_with_load_errors() == {3, 4}
    assert connector.build_connector_worker_meta().outcome.failed == {1, 2}
    connector.shutdown()


def test_the_errors_of_one_hook_do_not_fill_the_log(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge, "_told", Counter())

    @guarded(None)
    def hook(self: object) -> None:
        raise ValueError("again")

    connector = SimpleNamespace(errors=Counter())
    for _ in range(100):
        hook(connector)
    assert connector.errors == {"hook_errors/hook": 100}
    assert 1 <= len(caplog.records) <= 20


class Kinds(dict):
    """vLLM's kinds of metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        super().__init__({kind: self._of(kind) for kind in (Gauge, PromCounter, Histogram)})

    def _of(self, kind: type) -> Callable[..., object]:
        return lambda **options: kind(**options, registry=self.registry)


def meter() -> tuple[Meter, Heartbeat, list[int]]:
    now = [10_000]
    heart = Heartbeat(lambda: None, lambda: None, Timing())
    return Meter("scheduler", heart, lambda: now[0]), heart, now


def test_what_was_counted_is_told_once() -> None:
    teller, heart, now = meter()
    counts = Counter({"hit_tokens": 5})
    heart.changes.append(Change(State.HEALTHY, State.DEGRADED, "connection closed", 5, 0))
    told = teller.take(counts).to_dict()
    assert told["counts"] == {"hit_tokens": 5, "transitions/healthy to degraded": 1}
    assert told["health"] == {"scheduler": ["dormant", 0, 0, 0]}
    assert teller.take(counts) is None, "not every step has something to tell"
    now[0] += 1_000
    assert not teller.take(counts).is_empty(), "the state, once a second"


def test_what_processes_tell_adds_up_and_is_shown() -> None:
    healths = {"worker 0": ["healthy", 150, 200, 3_000]}, {"worker 1": ["degraded", 0, 0, 0]}
    one = Stats({"counts": {"hit_tokens": 5, "load_us": 2_000_000}, "health": healths[0]})
    two = Stats({"counts": {"hit_tokens": 2, "drops/load_stale": 1}, "health": healths[1]})
    both = one.aggregate(two)
    assert both.reduce()["hit_tokens"] == 7
    kinds = Kinds()
    config = SimpleNamespace(kv_transfer_config=None)
    shown = PromMetrics(config, kinds, ["model_name", "engine"], {0: ["tiny", "0"]})
    shown.observe(both.to_dict())
    text = generate_latest(kinds.registry).decode()
    assert 'vllm:lmconnector_hit_tokens_total{engine="0",model_name="tiny"} 7.0' in text
    assert 'vllm:lmconnector_load_seconds_total{engine="0",model_name="tiny"} 2.0' in text
    assert 'lmconnector_drops_total{engine="0",model_name="tiny",reason="load_stale"} 1.0' in text
    assert 'state{engine="0",model_name="tiny",process="worker 1",state="degraded"} 1.0' in text
    assert 'state{engine="0",model_name="tiny",process="worker 1",state="healthy"} 0.0' in text
    assert 'ping_seconds{engine="0",model_name="tiny",process="worker 0"} 0.00015' in text
    assert 'ping_mean_seconds{engine="0",model_name="tiny",process="worker 0"} 0.0002' in text
    assert 'ping_max_seconds{engine="0",model_name="tiny",process="worker 0"} 0.003' in text


def test_every_counter_of_the_code_is_in_the_catalogue() -> None:

    package = Path(inspect.getfile(LMConnector)).parent
    used = {
        name.partition("/")[0]
        for path in package.rglob("*.py")
        for name in re.findall(r'(?:counts|errors)\[f?"([a-z_/]+)', path.read_text())
    }
    assert used, "it is looked for in the right place"
    assert used <= set(COUNTERS)
