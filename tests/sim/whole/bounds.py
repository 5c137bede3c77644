"""Nothing grows without a bound and nothing lasts: tables, queues and ages, while a world goes on."""

from typing import TYPE_CHECKING

from lmconnector.client import PENDING_MAX
from sim.whole.engine import Engine

if TYPE_CHECKING:
    from sim.whole.system import System

INBOX_MAX = 64  # what other threads have said to a heartbeat before it listens
STEPS = 4  # from a copy's plan to its begin, and from its end to the scheduler's knowledge of it


class Bounds:
    def __init__(self, system: "System") -> None:
        self._system = system
        self._begun_ms: dict[tuple[str, int], int] = {}  # a copy -> when, as its engine counts time

    def check_engine(self, engine: Engine) -> None:
        side, requests = engine.side, len(engine.scheduler.requests)
        hearts = [member.heartbeat for member in engine.members]
        unanswered_max = self._system.setup.timing.fail_after
        for what, count, most in (
            ("records", len(side._records), requests),
            ("requests", len(side._requests), requests),
            ("slots", max(map(len, side.stores.stock._slots)), engine.options.stock_slots),
            ("requests without a reply", len(engine.client._pending), PENDING_MAX),
            ("pings without a pong", max(len(heart.health._unanswered) for heart in hearts), unanswered_max),
            ("things told to a heartbeat", max(len(heart._inbox) for heart in hearts), INBOX_MAX),
        ):
            assert count <= most, f"{engine.name}: {count} {what}, at most {most}"
        self._check_ages(engine)

    def check_server(self) -> None:
        service = self._system.server.service
        assert service is not None
        arena, limits = service.storage.arena, service.limits
        for engine in service.registry.engines.values():
            leases, reserved = service.leases.of(engine.name), arena.reserved_bytes(engine.owner)
            assert leases <= limits.leases_per_engine_max, f"{engine.name} has {leases} leases"
            assert reserved <= limits.stock_bytes_max, f"{engine.name} has {reserved} bytes reserved"
        reserved = arena.all_reserved_bytes()
        assert reserved <= limits.reserved_bytes_max, f"{reserved} bytes are reserved"
        assert len(service.registry) <= limits.members_max

    def _check_ages(self, engine: Engine) -> None:
        """Of loads, for which a request waits, and of stores, for which its blocks are held."""
        now_ms = self._awake_ms(engine)
        for number, job in engine.side.jobs._jobs.items():
            age_ms = now_ms - self._begun_ms.setdefault((engine.name, number), now_ms)
            assert age_ms <= self._copy_ms_max(engine), f"{engine.name}: {job.kind.value} of {age_ms} ms"

    def _awake_ms(self, engine: Engine) -> int:
        time = self._system.time
        stalled_ms = sum(process.stalled_ms for process in engine.processes)
        return time.now_ms - time.stalled_ms - stalled_ms

    def _copy_ms_max(self, engine: Engine) -> int:
        setup, faults = self._system.setup, self._system.drawn
        lookups_ms = len(self._system.engines) * setup.options.lookup_wait_ms
        drift_ms = 2 * engine.model.ranks * engine.drift_ms_max
        step_ms = 2 * engine.step_ms_max + drift_ms + lookups_ms + engine.idle_ms
        return faults.copy_ms_max + STEPS * engine.model.size.depth * max(step_ms, 1)
