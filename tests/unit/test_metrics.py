"""The exposition: what a Prometheus server reads."""

from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

from cache_server import report
from cache_server.counters import BUCKETS_US, Counters
from cache_server.metrics import COUNTER_HELP, exposition
from cache_server.protocol import messages as m
from kit import KIB, SLAB_BYTES, Peer, World, chain, make_service


class Nothing:
    """No metrics of health."""

    def collect(self) -> Iterator[Metric]:
        return iter(())


Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(world: World) -> Samples:
    status = report.describe(world.service, world.now_ms, 42, 7, "")
    content_type, body = exposition(status, Nothing())
    assert content_type.startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_every_counter_has_its_help() -> None:
    counted = {name for name in Counters.__slots__ if isinstance(getattr(Counters(), name), int)}
    assert set(COUNTER_HELP) == counted


def test_an_empty_server_can_be_scraped() -> None:
    samples = scrape(make_service())
    assert samples["cache_server_capacity_bytes", ()] == 8 * SLAB_BYTES
    assert samples["cache_server_served_total", ()] == 0


def test_the_uses_of_the_arena_add_up() -> None:
    world = make_service()
    peer = Peer(world, groups=(m.Group(12 * KIB),)).start()
    peer.store(chain(2))
    peer.reserve(1)
    samples = scrape(world)
    by_use = {
        labels[0][1]: value for (name, labels), value in samples.items() if name == "cache_server_arena_bytes"
    }
    assert sum(by_use.values()) == samples["cache_server_capacity_bytes", ()]
    assert (by_use["committed"], by_use["stocked"], by_use["waste"]) == (24 * KIB, 12 * KIB, 12 * KIB)


def test_latencies_are_cumulative_seconds() -> None:
    world = make_service()
    for us in (5, 15, 15, 5_000_000):
        world.service.counters.observe("lookup", us)
    samples = scrape(world)

    def bucket(bound: str) -> float:
        return samples["cache_server_request_seconds_bucket", (("le", bound), ("op", "lookup"))]

    assert bucket(str(BUCKETS_US[0] / 1e6)) == 1
    assert bucket(str(BUCKETS_US[1] / 1e6)) == 3
    assert bucket("1.0") == 3
    assert bucket("+Inf") == 4
    assert samples["cache_server_request_seconds_count", (("op", "lookup"),)] == 4
    assert samples["cache_server_request_seconds_sum", (("op", "lookup"),)] == 5.000035


def test_refusals_leases_and_workers_have_labels() -> None:
    world = make_service()
    peer = Peer(world).start()
    peer.store(chain(1))
    peer.lookup(chain(1))
    world.service.counters.refuse("BUSY")
    samples = scrape(world)
    assert samples["cache_server_refused_total", (("code", "BUSY"),)] == 1
    assert samples["cache_server_lease_events_total", (("event", "granted"),)] == 1
    assert samples["cache_server_leases", ()] == 1
    assert samples["cache_server_workers", (("state", "ready"),)] == 1
    assert samples["cache_server_chunks", ()] == 1
    assert samples["cache_server_evicted_chunks_total", ()] == 0
