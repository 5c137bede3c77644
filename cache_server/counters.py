"""What is counted, as plain integers: written by the one main loop, read by whoever shows them."""

from bisect import bisect_left
from dataclasses import dataclass, field

BUCKETS_US = (10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 50_000, 200_000, 1_000_000)


class Histogram:
    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS_US) + 1)
        self.sum_us = 0

    def observe(self, us: int) -> None:
        self.counts[bisect_left(BUCKETS_US, us)] += 1
        self.sum_us += us

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass(slots=True)
class Counters:
    lookups: int = 0
    lookup_hits: int = 0  # lookups that found at least one chunk
    chunks_asked: int = 0
    chunks_found: int = 0
    found_bytes: int = 0
    reserved_slots: int = 0
    stored_chunks: int = 0
    stored_bytes: int = 0
    existing_chunks: int = 0  # committed by somebody else before: their slots went back
    orphan_chunks: int = 0
    foreign_slots: int = 0
    aborted_slots: int = 0
    reclaimed_slots: int = 0  # of dead engines
    cleared_chunks: int = 0
    engines_gone: int = 0
    served: int = 0
    refused: dict[str, int] = field(default_factory=dict)  # by code
    latency: dict[str, Histogram] = field(default_factory=dict)  # by op

    def refuse(self, code: str) -> None:
        self.refused[code] = self.refused.get(code, 0) + 1

    def observe(self, op: str, us: int) -> None:
        self.served += 1
        histogram = self.latency.get(op)
        if histogram is None:
            histogram = self.latency[op] = Histogram()
        histogram.observe(us)
