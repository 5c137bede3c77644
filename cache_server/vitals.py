"""The parts of the process, each with its bounds, and the page that tells of them."""

from collections.abc import Iterator
from contextlib import contextmanager

from cache_server.beat_page import BeatPage
from cache_server.beats import Bounds, Part, Pulse
from cache_server.clock import monotonic_ms
from cache_server.config import Config
from cache_server.faults import Faults

TURN_MS = 200  # the watch's and the HTTP side's; a reader that turned later than three of them was asleep
LOOP_TURN_MS = 100
SNAPSHOT_MS = 500  # how often the loop tells what it knows
CANARY_TURN_MS = 500
POPULATE_STALL_MS = 60_000  # one step touches a few MiB


class Vitals:
    def __init__(self, config: Config) -> None:
        late_ms, stall_ms, age_ms = config.late_after, config.stall_after, config.work_age
        self.loop = Part("loop", Bounds(late_ms, stall_ms, LOOP_TURN_MS, age_ms), critical=True)
        self.watch = Part("watch", Bounds(late_ms, stall_ms, TURN_MS), critical=True)
        # Where it is late, only questions wait: no traffic does.
        self.http = Part("http", Bounds(stall_ms, stall_ms, TURN_MS), critical=True)
        populate = Bounds(POPULATE_STALL_MS, POPULATE_STALL_MS, age_ms=age_ms)
        self.populate = Part("populate", populate, critical=False)
        canary_ms = config.canary_deadline + stall_ms
        self.canary = Part("canary", Bounds(canary_ms, canary_ms, CANARY_TURN_MS), critical=False)
        self.parts = (self.loop, self.watch, self.http, self.populate, self.canary)
        self.faults = Faults(config.runtime_dir)
        self.page = BeatPage(config.runtime_dir, late_ms, stall_ms)

    @contextmanager
    def loop_busy(self, pulse: Pulse, name: str, lease_ms: int) -> Iterator[None]:
        """The main loop begins something that is legal and takes long."""
        self.page.leased(monotonic_ms() + lease_ms)
        try:
            with pulse.busy(name, lease_ms, monotonic_ms):
                yield
        finally:
            self.page.leased(0)

    def close(self) -> None:
        self.page.close()
