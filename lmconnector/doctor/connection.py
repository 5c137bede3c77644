"""What the server says when it is asked: that it answers, how fast, what it speaks, whom it knows."""

import statistics
import time

import msgspec

from cache_server.protocol import messages as m
from cache_server.protocol.messages import Code
from lmconnector.config import Options
from lmconnector.doctor.findings import Finding, fail, ok, warn
from lmconnector.doctor.visit import LOOK, RefusedError, Visit

PINGS = 100
PINGS_S = 2.0  # a slow server is asked less often
QUARANTINE_PERCENT = 10
CLOSED = (
    "if it is paused: cache-server resume; else it is about to stop: start it again, it keeps what it holds"
)
MIB = 1 << 20


class ArenaFacts(msgspec.Struct, frozen=True):
    capacity_bytes: int
    free_bytes: int
    used_bytes: int
    quarantined_bytes: int
    unpopulated_bytes: int = 0


class WorkerFacts(msgspec.Struct, frozen=True):
    engine: str
    role: str
    rank: int
    world: int
    state: str
    incomplete: str = ""
    canary: bool = False  # the server's own


class Facts(msgspec.Struct, frozen=True):
    """What is wanted of STATUS, which is free in form."""

    arena: ArenaFacts
    worker_rows: tuple[WorkerFacts, ...] = ()
    population_failure: str = ""


def server(visit: Visit) -> Finding:
    """Raises what `Visit.ping` does: without it there is nothing more to ask."""
    pong = visit.ping()
    found = f"answers, {pong.state}, boot {pong.boot:016x}"
    match pong.state:
        case "draining":
            return warn("server", found, CLOSED)
        case "starting":
            return warn("server", found, "ask again in a few seconds")
        case "ready":
            return ok("server", found)


def round_trip(visit: Visit) -> Finding:
    took_us: list[float] = []
    end_s = time.perf_counter() + PINGS_S
    while len(took_us) < PINGS and time.perf_counter() < end_s:
        began_ns = time.perf_counter_ns()
        visit.ping()
        took_us.append((time.perf_counter_ns() - began_ns) / 1_000)
    median_us = statistics.median(took_us)
    bound_us = 1_000 * Options().lookup_wait_ms
    found = (
        f"p50 {median_us:.0f} µs, worst {max(took_us):.0f} µs of {len(took_us)} PINGs; "
        f"a step waits {bound_us} µs for a lookup at most"
    )
    if median_us < bound_us / 2:
        return ok("round trip", found)
    return warn(
        "round trip", found, "give the server a core of its own; look at its load with cache-server top"
    )


def protocol(visit: Visit, part_bytes: int) -> tuple[Finding, m.Registered | None]:
    mine = f"{m.VERSION_MIN}..{m.VERSION_MAX}"
    try:
        registered = visit.register(part_bytes)
    except RefusedError as refusal:
        advice = {
            Code.VERSION: "install the same lmconnector for server and engine",
            Code.DRAINING: CLOSED,
            Code.BUSY: "end engines that are not needed",
            Code.NO_PROOF: "server and engine see different files in the runtime dir: mount the same one",
        }.get(refusal.code, LOOK)
        finding = warn if refusal.code == Code.DRAINING else fail
        return finding("protocol", f"{refusal}", advice), None
    except OSError as error:
        advice = "the server's user and its `group` may register, nobody else"
        return fail("protocol", f"presence file: {error.filename}: {error.strerror}", advice), None
    return ok(
        "protocol", f"registered with version {registered.version}; this side speaks {mine}"
    ), registered


def told(visit: Visit) -> tuple[Finding, Finding]:
    """What STATUS says of engines and space."""
    try:
        facts = msgspec.convert(visit.status(), Facts)
    except msgspec.ValidationError as error:
        advice = "install the same lmconnector for server and engine"
        words = f"STATUS tells it in another way: {error}"
        return warn("engines", words, advice), warn("arena space", words, advice)
    except RefusedError as refusal:
        return fail("engines", str(refusal), LOOK), fail("arena space", str(refusal), LOOK)
    return engines(facts), space(facts)


def space(facts: Facts) -> Finding:
    arena = facts.arena
    found = (
        f"{_mib(arena.capacity_bytes)} = {_mib(arena.free_bytes)} free + {_mib(arena.used_bytes)} used + "
        f"{_mib(arena.quarantined_bytes)} quarantined"
    )
    if facts.population_failure:
        return warn(
            "arena space", f"{found}; {facts.population_failure}", "make room in the memory file system"
        )
    if 100 * arena.quarantined_bytes > QUARANTINE_PERCENT * arena.capacity_bytes:
        advice = "it comes back when silent engines speak or end: cache-server workers shows them"
        return warn("arena space", found, advice)
    if arena.unpopulated_bytes:
        found += f"; {_mib(arena.unpopulated_bytes)} of the free are still being populated"
    return ok("arena space", found)


def engines(facts: Facts) -> Finding:
    rows = [row for row in facts.worker_rows if not row.canary]
    if not rows:
        return ok("engines", "none is registered")
    by_engine: dict[str, list[WorkerFacts]] = {}
    for row in rows:
        by_engine.setdefault(row.engine, []).append(row)
    words = "; ".join(
        f"{engine[:24]}: " + ", ".join(f"{row.role} {row.rank}/{row.world} {row.state}" for row in members)
        for engine, members in by_engine.items()
    )
    incomplete = sorted({row.incomplete for row in rows if row.incomplete})
    if incomplete:
        return warn(
            "engines", f"{words}: {'; '.join(incomplete)}", "look at the log of the workers not listed"
        )
    if any(row.state == "silent" for row in rows):
        return warn("engines", words, "a silent one hangs or is stopped: look at its process")
    return ok("engines", words)


def _mib(size: int) -> str:
    return f"{size / MIB:.0f} MiB"
