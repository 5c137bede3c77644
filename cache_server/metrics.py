"""The snapshot as Prometheus text."""

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Protocol

from prometheus_client.core import (
    CollectorRegistry,
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from cache_server.counters import BUCKETS_US
from cache_server.report import Status

PREFIX = "cache_server_"
COUNTER_HELP = {
    "lookups": "LOOKUP requests answered",
    "lookup_hits": "LOOKUP requests that found at least one chunk",
    "chunks_asked": "Chunks that LOOKUPs asked for",
    "chunks_found": "Chunks that LOOKUPs found",
    "found_bytes": "Bytes of KV cache that LOOKUPs found",
    "reserved_slots": "Slots handed out by RESERVE",
    "stored_chunks": "Chunks committed",
    "stored_bytes": "Bytes of KV cache committed",
    "existing_chunks": "Commits of a key that was there already; the slot went back",
    "orphan_chunks": "Commits under a parent that is not stored; the slot went back",
    "foreign_slots": "Commits of slots their sender had not reserved; ignored",
    "aborted_slots": "Reserved slots given back unused",
    "reclaimed_slots": "Reserved slots taken back from dead engines",
    "cleared_chunks": "Chunks dropped by CLEAR",
    "engines_gone": "Engines whose processes all died without saying so",
    "served": "Messages answered, refusals included",
}


class Collector(Protocol):
    def collect(self) -> Iterator[Metric]: ...


def exposition(status: Status | None, vital: Collector) -> tuple[str, bytes]:
    """-> content type and body; there is no status before the server has started"""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(vital)
    if status is not None:
        registry.register(_Snapshot(status))
    return CONTENT_TYPE_LATEST, generate_latest(registry)


class _Snapshot:
    def __init__(self, status: Status) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status
        for name, value in status.counters.items():
            yield CounterMetricFamily(PREFIX + name, COUNTER_HELP[name], value=value)
        yield CounterMetricFamily(
            PREFIX + "evicted_chunks", "Chunks that made room", value=status.chunks.evicted
        )
        yield from self._gauges()
        yield from self._leases()
        yield _labelled(
            CounterMetricFamily(PREFIX + "refused", "Requests refused, by code", labels=["code"]),
            status.refused,
        )
        yield self._latency()

    def _gauges(self) -> Iterator[Metric]:
        status, arena = self._status, self._status.arena
        yield _labelled(
            GaugeMetricFamily(PREFIX + "arena_bytes", "Bytes of the arena, by use", labels=["use"]),
            {
                "free": arena.free_bytes - arena.unpopulated_bytes,
                "unpopulated": arena.unpopulated_bytes,
                "committed": arena.committed_bytes,
                "stocked": arena.stocked_bytes,
                "quarantined": arena.quarantined_bytes,
                "waste": arena.waste_bytes,
            },
        )
        yield GaugeMetricFamily(PREFIX + "capacity_bytes", "Size of the arena", value=arena.capacity_bytes)
        yield GaugeMetricFamily(PREFIX + "chunks", "Chunks stored", value=status.chunks.stored)
        yield GaugeMetricFamily(PREFIX + "uptime_seconds", "Since this start", value=status.uptime_s)
        workers = GaugeMetricFamily(PREFIX + "workers", "Engine processes, by state", labels=["state"])
        yield _labelled(workers, status.workers)

    def _leases(self) -> Iterator[Metric]:
        leases = self._status.leases
        yield GaugeMetricFamily(PREFIX + "leases", "Leases outstanding", value=leases.outstanding)
        yield _labelled(
            CounterMetricFamily(
                PREFIX + "lease_events", "Leases, by what happened to them", labels=["event"]
            ),
            {"granted": leases.granted, "released": leases.released, "expired": leases.expired},
        )

    def _latency(self) -> Metric:
        family = HistogramMetricFamily(
            PREFIX + "request_seconds", "Time from a message's receipt to its reply, by op", labels=["op"]
        )
        bounds = [*(str(bound / 1e6) for bound in BUCKETS_US), "+Inf"]
        for op, latency in self._status.latency.items():
            buckets = list(zip(bounds, accumulate(latency.counts), strict=True))
            family.add_metric([op], buckets, sum_value=latency.sum_us / 1e6)
        return family


def _labelled(
    family: GaugeMetricFamily | CounterMetricFamily, values: Mapping[str, int]
) -> GaugeMetricFamily | CounterMetricFamily:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
