"""Plain integers, and latencies in buckets."""

import pytest

from cache_server.counters import BUCKETS_US, Counters, Histogram


@pytest.mark.parametrize(
    ("us", "bucket"), [(0, 0), (10, 0), (11, 1), (20, 1), (1_000_000, 12), (1_000_001, 13), (10**9, 13)]
)
def test_a_bound_belongs_to_its_bucket(us: int, bucket: int) -> None:
    histogram = Histogram()
    histogram.observe(us)
    assert histogram.counts.index(1) == bucket
    assert len(histogram.counts) == len(BUCKETS_US) + 1


def test_a_histogram_sums_up() -> None:
    histogram = Histogram()
    for us in (3, 15, 15, 2_000_000):
        histogram.observe(us)
    assert (histogram.count, histogram.sum_us) == (4, 2_000_033)


def test_each_op_has_its_latency_and_each_code_its_count() -> None:
    counters = Counters()
    counters.observe("lookup", 5)
    counters.observe("lookup", 7)
    counters.observe("ping", 1)
    counters.refuse("BUSY")
    counters.refuse("BUSY")
    counters.refuse("DENIED")
    assert counters.served == 3
    assert {op: histogram.sum_us for op, histogram in counters.latency.items()} == {"lookup": 12, "ping": 1}
    assert counters.refused == {"BUSY": 2, "DENIED": 1}
