"""What the connector tells vLLM's metrics: what was counted since the last time, and how the heartbeats are.

Each process counts for itself; vLLM gathers what changed with its steps, adds it up, and shows it on
`/metrics` of its front end, and in a line of its log.  An idle engine makes no steps: its gauges are as of
the last one.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from lmconnector.bridge import Shielded
from lmconnector.health import State
from lmconnector.heartbeat import Heartbeat

PREFIX = "vllm:lmconnector_"
HEALTH_EVERY_MS = 1_000  # when nothing else is to be told

# What is counted: the name before the slash, the value of its label after it.
COUNTERS: dict[str, tuple[str, str]] = {
    "lookups": ("outcome", "Lookups that were answered, by outcome"),
    "loads": ("", "Hits that were loaded, or that vLLM was told would be"),
    "hit_tokens": ("", "Tokens of those hits"),
    "load_bytes": ("", "Bytes copied out of the arena, all workers together"),
    "load_us": ("", "Time that those copies took, all workers together"),
    "store_bytes": ("", "Bytes copied into the arena, all workers together"),
    "store_us": ("", "Time that those copies took, all workers together"),
    "chunks_stored": ("", "Chunks stored, per cache group"),
    "chunks_stored_before": ("", "Chunks that another engine had stored meanwhile"),
    "copies_overdue": ("", "Copies that were under way for longer than their deadline, and were waited for"),
    "drops": ("reason", "Lookups, loads and chunks to store that came to nothing, by reason"),
    "transitions": ("change", "Changes of the heartbeats' state"),
    "hook_errors": ("hook", "Exceptions caught in the connector's hooks: bugs"),
}

ROUND_TRIPS: dict[str, str] = {
    "ping_seconds": "Round trip of the last answered ping, as of the engine's last step",
    "ping_mean_seconds": "Round trip of the latest pings, the newest weighing most",
    "ping_max_seconds": "Longest round trip of a ping since the process began",
}


class Stats(KVConnectorStats):
    """`data`: {"counts": {name: n}, "health": {process: [state, last, mean, longest round trip in us]}}"""

    data: dict[str, Any]

    def reset(self) -> None:
        self.data = {"counts": {}, "health": {}}

    def aggregate(self, other: KVConnectorStats) -> "Stats":
        with Shielded("aggregate"):
            counts = Counter(self.data["counts"]) + Counter(other.data["counts"])
            return Stats({"counts": dict(counts), "health": self.data["health"] | other.data["health"]})
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log."""
        with Shielded("reduce"):
            return self._words()
        return {}

    def is_empty(self) -> bool:
        return not self.data["counts"] and not self.data["health"]

    def _words(self) -> dict[str, int | float]:
        counts = self.data["counts"]
        words = {name: counts[name] for name in ("hit_tokens", "chunks_stored") if counts.get(name)}
        for name in ("load", "store"):
            copied_bytes, took_us = counts.get(f"{name}_bytes"), counts.get(f"{name}_us")
            if copied_bytes and took_us:
                words[f"{name}_MB_per_s"] = round(copied_bytes / took_us)
        return words | {name: n for name, n in sorted(counts.items()) if name.startswith("drops/")}


class Meter:
    """One process's own."""

    def __init__(self, process: str, heartbeat: Heartbeat, clock: Callable[[], int]) -> None:
        self._process = process
        self._heartbeat = heartbeat
        self._clock = clock
        self._told_ms = 0

    def take(self, *counters: Counter[str]) -> Stats | None:
        """What was counted since the last time; None: there is nothing to tell."""
        counts: Counter[str] = Counter()
        for counter in counters:
            counts += counter
            counter.clear()
        while self._heartbeat.changes:
            change = self._heartbeat.changes.popleft()
            counts[f"transitions/{change.old.value} to {change.new.value}"] += 1
        now_ms = self._clock()
        if not counts and now_ms - self._told_ms < HEALTH_EVERY_MS:
            return None
        self._told_ms = now_ms
        trip = self._heartbeat.round_trip
        health = [self._heartbeat.health.state.value, trip.last_us, trip.mean_us, trip.max_us]
        return Stats({"counts": dict(counts), "health": {self._process: health}})


class PromMetrics(KVConnectorPromMetrics):
    def __init__(
        self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(
                name=PREFIX + name.replace("_us", "_seconds"),
                documentation=text,
                labelnames=[*labelnames, *([label] if label else [])],
            )
            for name, (label, text) in COUNTERS.items()
        }
        self._state = self._gauge(
            "state", "1 for the state that a process's heartbeat is in, as of the engine's last step", "state"
        )
        self._round_trips = [self._gauge(name, text) for name, text in ROUND_TRIPS.items()]

    def _gauge(self, name: str, text: str, *labels: str) -> Any:
        names = [*self._labelnames, "process", *labels]
        return self._gauge_cls(
            name=PREFIX + name, documentation=text, labelnames=names, multiprocess_mode="mostrecent"
        )

    def observe(self, transfer_stats_data: Mapping[str, Any], engine_idx: int = 0) -> None:
        with Shielded("observe"):
            self._show(transfer_stats_data, self.per_engine_labelvalues[engine_idx])

    def _show(self, data: Mapping[str, Any], engine: Any) -> None:
        for key, n in data["counts"].items():
            name, _, value = key.partition("/")
            amount = n / 1e6 if name.endswith("_us") else n
            self._counters[name].labels(*engine, *([value] if value else [])).inc(amount)
        for process, (state, *trips_us) in data["health"].items():
            for each in State:
                self._state.labels(*engine, process, each.value).set(each.value == state)
            for gauge, us in zip(self._round_trips, trips_us, strict=True):
                gauge.labels(*engine, process).set(us / 1e6)


def prom_metrics(*arguments: Any) -> PromMetrics | None:
    """Without them vLLM shows its own only."""
    with Shielded("build_prom_metrics"):
        return PromMetrics(*arguments)
    return None
