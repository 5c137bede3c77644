"""The verbs that ask a running server."""

import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from cache_server import __version__, runtime
from cache_server.client import Client, RefusedError, UnreachableError
from cache_server.limits import CLEAR_MS_MAX
from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError
from cache_server.protocol.presence import TOKEN
from cache_server.report import Status, WorkerReport

ANSWER_MS = 2_000
CLEAR_MS = CLEAR_MS_MAX + ANSWER_MS
NOBODY_MS = 200  # where no server runs, and yet somebody may listen who is none
TOP_INTERVAL_S = 1.0
CLEAR_SCREEN = "\x1b[H\x1b[2J"


def run(verb: str, runtime_dir: Path, *, as_json: bool) -> int:
    verbs: dict[str, Callable[[Client], str]] = {
        "ping": _ping,
        "clear": lambda client: _clear(client, runtime_dir),
        "status": lambda client: _json(_ask(client)) if as_json else _status_text(_ask(client)),
        "workers": lambda client: _workers(client, as_json=as_json),
    }
    try:
        served = runtime.is_served(runtime_dir)
    except runtime.CannotTellError as error:
        print(f"cache-server: {error}", file=sys.stderr)
        return 2
    patience_ms = (CLEAR_MS if verb == "clear" else ANSWER_MS) if served else NOBODY_MS
    try:
        with Client(runtime_dir, patience_ms) as client:
            if verb == "top":
                return _top(client)
            print(verbs[verb](client))
    except UnreachableError as error:
        words = f"{error}: `cache-server check --live` tells whether it hangs"
        print(f"cache-server: {words if served else f'no server runs on {runtime_dir}'}", file=sys.stderr)
        return 1
    except (RefusedError, OSError) as error:
        print(f"cache-server: {error}", file=sys.stderr)
        return 1
    except (ProtocolError, msgspec.ValidationError) as error:
        print(
            f"cache-server: the server on {runtime_dir} is not understood by version {__version__}: {error}: "
            "it is another version, or none: ask with the cache-server that runs it",
            file=sys.stderr,
        )
        return 1
    return 0


def _ask(client: Client, *, workers: bool = False) -> Status:
    reply = client.ask(m.Status(id=client.next_id(), workers=workers), m.StatusReply)
    return msgspec.convert(reply.status, Status)


def _json(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value)).decode()


def _ping(client: Client) -> str:
    client.ask(m.Ping(id=client.next_id()), m.Pong)  # connects
    began_ns = time.perf_counter_ns()
    pong = client.ask(m.Ping(id=client.next_id()), m.Pong)
    took_us = (time.perf_counter_ns() - began_ns) // 1_000
    return f"{pong.state}: boot {pong.boot:016x}, {took_us} µs"


def _clear(client: Client, runtime_dir: Path) -> str:
    try:
        token = (runtime_dir / TOKEN).read_text().strip()
    except OSError as error:
        client.ask(m.Ping(id=client.next_id()), m.Pong)  # if nobody runs there, that is what to say
        whose = "run this as the user of the server"
        raise OSError(
            f"{error.filename}: {error.strerror}: only who can read it may clear: {whose}"
        ) from error
    return f"cleared {client.ask(m.Clear(id=client.next_id(), token=token), m.Done).count} chunks"


def _workers(client: Client, *, as_json: bool) -> str:
    rows = _ask(client, workers=True).worker_rows
    return _json(rows) if as_json else _worker_table(rows)


def _worker_table(rows: tuple[WorkerReport, ...]) -> str:
    lines = [
        f"{'engine':24} {'role':>9} {'rank':>7} {'pid':>8} {'state':>8} {'silent':>8} {'stock':>9} leases"
    ]
    lines += [
        f"{row.engine[:24]:24} {row.role:>9} {f'{row.rank}/{row.world}':>7} {row.pid:>8} {row.state:>8} "
        f"{row.silent_ms:>5} ms {_mib(row.stock_bytes):>9} {row.leases:>6}  "
        f"{'canary ' if row.canary else ''}{row.incomplete}".rstrip()
        for row in rows
    ]
    return "\n".join(lines) if rows else "no worker is registered"


def _status_text(status: Status) -> str:
    arena, counters = status.arena, status.counters
    percent = 100 * counters["chunks_found"] // max(1, counters["chunks_asked"])
    trouble = f"\npopulating  {status.population_failure}" if status.population_failure else ""
    return f"""\
server      {status.state}, boot {status.boot}, pid {status.pid}, up {status.uptime_s} s
arena       {arena.path}: {_mib(arena.capacity_bytes)} = {_mib(arena.free_bytes)} free \
+ {_mib(arena.used_bytes)} used + {_mib(arena.quarantined_bytes)} quarantined{trouble}
chunks      {status.chunks.stored} stored, {status.chunks.restored} from before the start, \
{status.chunks.evicted} evicted
lookups     {counters["lookups"]}, of {counters["chunks_asked"]} chunks asked for {percent} % found
leases      {status.leases.outstanding} outstanding, {status.leases.expired} expired
workers     {", ".join(f"{count} {state}" for state, count in status.workers.items() if count) or "none"}
refused     {", ".join(f"{count} {code}" for code, count in status.refused.items()) or "none"}"""


def _top(client: Client) -> int:
    before: Status | None = None
    try:
        while True:
            now = _ask(client, workers=True)
            print(CLEAR_SCREEN if sys.stdout.isatty() else "", end="")
            print(
                _status_text(now), _rates(before, now), _worker_table(now.worker_rows), sep="\n", flush=True
            )
            before = now
            if select.select([sys.stdin], [], [], TOP_INTERVAL_S)[0] and not sys.stdin.readline():
                return 0  # the end of a script's input ends it; a person presses ^C
    except KeyboardInterrupt:
        return 0


def _rates(before: Status | None, now: Status) -> str:
    names = ("served", "lookups", "chunks_found", "stored_chunks")
    return "per second  " + ", ".join(
        f"{now.counters[name] - before.counters[name] if before else 0} {name.replace('_', ' ')}"
        for name in names
    )


def _mib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 10 << 30 else f"{size / (1 << 20):.0f} MiB"
