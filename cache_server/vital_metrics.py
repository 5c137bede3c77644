"""The metrics about health.  `CATALOGUE` is what there is; alerts and dashboards are checked against it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from cache_server.answers import Facts
from cache_server.beats import Motion
from cache_server.counters import BUCKETS_US, Histogram
from cache_server.health import State
from cache_server.report import Latency

PREFIX = "cache_server_"
CATALOGUE = {
    "state": "1 for the state the server is in",
    "live": "1 while every critical part moves",
    "ready": "1 while traffic may come",
    "state_seconds": "Since the last change of state",
    "holds": "How many hold readiness",
    "transitions": "Changes of state",
    "stack_dumps": "Stalls whose stacks were logged",
    "part_state": "1 for the state that a part of the process is in",
    "part_ticks": "Turns of each part",
    "part_finished": "Pieces of work that each part has finished",
    "part_unmoved_seconds": "How long a part's outstanding work has not moved",
    "part_oldest_seconds": "Age of a part's oldest outstanding work",
    "part_leased_seconds": "What is left of a part's leases for long work",
    "canary_runs": "Runs of the canary, by result",
    "canary_late": "Outcomes that came after their run was given up",
    "canary_failures": "Failed runs in a row",
    "canary_good_seconds": "Since the last good run",
    "canary_seconds": "Time that runs of the canary took",
    "http_seconds": "Time from a request's receipt to the end of its answer, by page",
    "engines": "Engines, by state",
    "tier_state": "1 for the state that a tier is in",
}
TIER_STATES = ("ready", "degraded", "failed")


@dataclass(frozen=True, slots=True, eq=False)  # prometheus_client keeps it as a key
class VitalMetrics:
    facts: Facts
    canary_latency: Latency
    dumps: int
    http_latency: Mapping[str, Histogram]

    def collect(self) -> Iterator[Metric]:
        yield from self._states()
        yield from self._parts()
        yield from self._canary()
        pages = {name: Latency(tuple(each.counts), each.sum_us) for name, each in self.http_latency.items()}
        yield _histogram("http_seconds", "page", pages)
        endpoints = self.facts.endpoints
        if endpoints is not None:
            yield _gauge("engines", "state", endpoints.engine_counts)
            tiers = GaugeMetricFamily(*_named("tier_state"), labels=["tier", "state"])
            for row in endpoints.tiers:
                for state in TIER_STATES:
                    tiers.add_metric([row.tier, state], int(row.state == state))
            yield tiers

    def _states(self) -> Iterator[Metric]:
        facts, verdict = self.facts, self.facts.verdict
        yield _gauge("state", "state", {state.value: int(state is verdict.state) for state in State})
        yield GaugeMetricFamily(*_named("live"), value=int(facts.live))
        yield GaugeMetricFamily(*_named("ready"), value=int(facts.ready))
        since_s = (facts.now_ms - verdict.since_ms) / 1_000
        yield GaugeMetricFamily(*_named("state_seconds"), value=since_s)
        yield GaugeMetricFamily(*_named("holds"), value=len(facts.holds))
        transitions = CounterMetricFamily(*_named("transitions"), labels=["from", "to", "reason"])
        for labels, count in verdict.transition_counts.items():
            transitions.add_metric(list(labels), count)
        yield transitions
        yield CounterMetricFamily(*_named("stack_dumps"), value=self.dumps)

    def _parts(self) -> Iterator[Metric]:
        facts = self.facts
        states = GaugeMetricFamily(*_named("part_state"), labels=["part", "state"])
        for part in facts.parts:
            for motion in Motion:
                states.add_metric([part.name, motion.value], int(facts.judged[part.name].motion is motion))
        yield states
        beats = {part.name: part.beat for part in facts.parts if part.beat is not None}
        yield _counter("part_ticks", "part", {name: beat.ticks for name, beat in beats.items()})
        yield _counter("part_finished", "part", {name: beat.finished for name, beat in beats.items()})
        judged = facts.judged.items()
        yield _gauge("part_unmoved_seconds", "part", {name: j.unmoved_ms / 1_000 for name, j in judged})
        yield _gauge("part_oldest_seconds", "part", {name: j.outstanding_ms / 1_000 for name, j in judged})
        left = {
            part.name: max((lease.until_ms - facts.now_ms for lease in part.leases), default=0) / 1_000
            for part in facts.parts
        }
        yield _gauge("part_leased_seconds", "part", left)

    def _canary(self) -> Iterator[Metric]:
        facts, record = self.facts, self.facts.record
        yield _counter("canary_runs", "result", record.counts)
        yield CounterMetricFamily(*_named("canary_late"), value=record.late)
        yield GaugeMetricFamily(*_named("canary_failures"), value=record.failures)
        if record.good_ms is not None:
            good_s = (facts.now_ms - record.good_ms) / 1_000
            yield GaugeMetricFamily(*_named("canary_good_seconds"), value=good_s)
        yield _histogram("canary_seconds", "", {"": self.canary_latency})


def _named(name: str) -> tuple[str, str]:
    return PREFIX + name, CATALOGUE[name]


def _gauge(name: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(*_named(name), labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _counter(name: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(*_named(name), labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _histogram(name: str, label: str, latencies: Mapping[str, Latency]) -> Metric:
    family = HistogramMetricFamily(*_named(name), labels=[label] if label else [])
    bounds = [*(str(bound / 1e6) for bound in BUCKETS_US), "+Inf"]
    for value, latency in latencies.items():
        buckets = list(zip(bounds, accumulate(latency.counts), strict=True))
        family.add_metric([value] if label else [], buckets, sum_value=latency.sum_us / 1e6)
    return family
