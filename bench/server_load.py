"""How many requests a second the server answers to 1, 8 and 64 clients, beside a bare echo."""

import os
import time
from collections.abc import Callable, Sequence

from bench.chunks import CHAIN_CHUNKS, Filler
from bench.kit import Server, Wire, busy_s, cpu_ns, echo_request, spread, workplace
from cache_server.protocol import messages as m
from cache_server.protocol.codec import decode_reply, encode
from cache_server.protocol.keys import HASH_BYTES

LOADS = ((1, 1), (1, 16), (8, 1), (64, 1))  # clients, requests each has out at a time
MIX_KEYS = 32
CORES = len(os.sched_getaffinity(0))
WHOLE_CORE_PERCENT = 85

Script = Sequence[bytes]


def measure(*, quick: bool) -> dict:
    rounds, seconds = (2, 0.5) if quick else (5, 2.0)
    figures: dict[str, dict] = {}
    with workplace() as place:
        server = Server(place, "load", "1GiB")
        filler = Filler(server.runtime_dir)
        filler.fill(64 * CHAIN_CHUNKS)
        server.wait_populated()
        place.echo().close()
        scripts: dict[str, Callable[[int], Script]] = {
            "ping": lambda _: [encode(m.Ping(id=1, session=filler.session.session))],
            "mix": lambda client: _mix(filler, client),
        }
        for name, script_of in scripts.items():
            for clients, outstanding in LOADS:
                ours = [(Wire(server.socket_path), script_of(client)) for client in range(clients)]
                echoes = [(Wire(place.echo_path), _like(*pair)) for pair in ours]
                _check(ours)
                runs: dict[str, list[dict]] = {"server": [], "echo": []}
                for turn in range(rounds + 1):
                    pairs = (("server", server.pid, ours), ("echo", place.echo_pid, echoes))
                    for side, pid, wires in pairs:
                        run = _run(pid, wires, outstanding, seconds if turn else 0.1)
                        if turn:
                            runs[side].append(run)
                figures[f"{name}, {clients} clients, {outstanding} out"] = _figures(runs)
                for wire, _ in (*ours, *echoes):
                    wire.close()
        filler.session.abandon()
        server.kill()
    return figures


def _mix(filler: Filler, client: int) -> Script:
    """LOOKUP of 32 stored keys, RELEASE, PING."""
    session, name = filler.session.session, f"bench-{client}"
    hashes = filler.prompts[client % len(filler.prompts)][: HASH_BYTES * MIX_KEYS]
    return [
        encode(filler.lookup(hashes, name)),
        encode(m.Release(id=1, session=session, requests=(name,))),
        encode(m.Ping(id=1, session=session)),
    ]


def _like(wire: Wire, script: Script) -> Script:
    """The same sizes for the echo."""
    return [echo_request(len(request), len(wire.trip(request))) for request in script]


def _check(wires: Sequence[tuple[Wire, Script]]) -> None:
    for wire, script in wires:
        for request in script:
            assert not isinstance(decode_reply(wire.trip(request)), m.Refused), "the script works"


def _run(
    pid: int, wires: Sequence[tuple[Wire, Script]], outstanding: int, seconds: float
) -> dict[str, float]:
    before, busy_before_s = cpu_ns(pid), busy_s()
    began_ns, mine_ns, mine_all_ns = time.perf_counter_ns(), time.thread_time_ns(), time.process_time_ns()
    answered = _drive(wires, outstanding, seconds)
    elapsed_ns = time.perf_counter_ns() - began_ns
    after, busy_ns = cpu_ns(pid), (busy_s() - busy_before_s) * 1e9
    server_ns = after["all"] - before["all"]
    others_ns = busy_ns - server_ns - (time.process_time_ns() - mine_all_ns)
    return {
        "per_s": answered / elapsed_ns * 1e9,
        "cpu_us": server_ns / answered / 1_000,
        "loop_percent": 100 * (after["main"] - before["main"]) / elapsed_ns,
        "generator_percent": 100 * (time.thread_time_ns() - mine_ns) / elapsed_ns,
        "others_percent": max(0.0, 100 * others_ns / elapsed_ns),
        "cores_percent": 100 * busy_ns / elapsed_ns / CORES,
    }


def _drive(wires: Sequence[tuple[Wire, Script]], outstanding: int, seconds: float) -> int:
    """Each client sends its next request when an answer is in.  The ROUTER serves its clients in turn, so
    waiting for them in turn keeps all of them busy and costs no poll."""
    lanes = [(wire.send, wire.receive, script) for wire, script in wires]
    for step in range(outstanding):
        for send, _, script in lanes:
            send(script[step % len(script)])
    step = outstanding
    end_s = time.perf_counter() + seconds
    answered = 0
    while time.perf_counter() < end_s:
        for send, receive, script in lanes:
            receive()
            send(script[step % len(script)])
        step += 1
        answered += len(lanes)
    for _ in range(outstanding):
        for _, receive, _ in lanes:
            receive()
    return answered + outstanding * len(lanes)


def _figures(runs: dict[str, list[dict]]) -> dict:
    figures: dict = {
        side: {name: spread([run[name] for run in side_runs]) for name in side_runs[0]}
        for side, side_runs in runs.items()
    }
    pairs = zip(runs["server"], runs["echo"], strict=True)
    figures["ratio"] = spread([one["per_s"] / other["per_s"] for one, other in pairs], 2)
    figures["limited_by"] = _limit({name: value["median"] for name, value in figures["server"].items()})
    return figures


def _limit(shares: dict[str, float]) -> str:
    """The thread that has a whole core holds up the others; without one, all cores or the waiting do."""
    if max(shares["loop_percent"], shares["generator_percent"]) > WHOLE_CORE_PERCENT:
        return "server" if shares["loop_percent"] > shares["generator_percent"] else "generator"
    return "cores" if shares["cores_percent"] > WHOLE_CORE_PERCENT else "waiting for answers"


def summary(figures: dict) -> list[tuple[str, str]]:
    return [(name, _line(row["server"], row["echo"], row)) for name, row in figures.items()]


def _line(ours: dict, echo: dict, row: dict) -> str:
    per_s = ours["per_s"]
    shares = ", ".join(
        f"{name} {ours[f'{name}_percent']['median']:.0f}" for name in ("loop", "generator", "others", "cores")
    )
    return (
        f"{per_s['median']:.0f}/s ({per_s['least']:.0f}..{per_s['most']:.0f}); "
        f"echo {echo['per_s']['median']:.0f}/s; ratio {row['ratio']['median']}; "
        f"cpu {ours['cpu_us']['median']} us; % {shares}: limited by {row['limited_by']}"
    )
