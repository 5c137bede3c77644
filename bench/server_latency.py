"""Round trips over one DEALER, beside a bare ROUTER that echoes frames of the same sizes."""

import time
from collections.abc import Callable

from bench.chunks import Filler
from bench.kit import Server, Workplace, cpu_ns, echo_request, interleaved, latency_us, ratio, workplace
from cache_server.protocol import messages as m
from cache_server.protocol.codec import decode_reply, encode
from cache_server.protocol.keys import pack_slot_names, split_slot_refs

LOOKUP_KEYS = 512
COMMIT_CHUNKS = 16
STOCK_SLOTS = 1_024
FULL_CAPACITY = "128MiB"  # 32,768 slots


class Bench:
    """A server and the echo beside it, measured in turn."""

    def __init__(self, place: Workplace, server: Server, *, quick: bool) -> None:
        self.rounds, self.trips = (4, 100) if quick else (20, 250)
        self.filler = Filler(server.runtime_dir)
        self._wire = server.wire
        self._echo = place.echo()
        self._pids = {"server": server.pid, "echo": place.echo_pid}

    def close(self) -> None:
        self._echo.close()
        self.filler.session.abandon()

    def request(self, request: m.Request) -> dict:
        packed = encode(request)
        reply_bytes = len(self._wire.trip(packed))
        same_size = echo_request(len(packed), reply_bytes)
        return {
            "request_bytes": len(packed),
            "reply_bytes": reply_bytes,
            **self._compare(
                lambda: self._wire.trips_ns(packed, self.trips),
                lambda: self._echo.trips_ns(same_size, self.trips),
            ),
        }

    def reserve_commit(self) -> dict:
        """Both trips together; what the client does in between is not counted."""
        reserve = encode(m.Reserve(id=1, session=self.filler.session.session, count=COMMIT_CHUNKS))
        same_sizes: list[bytes] = []
        trips = self.trips // 2

        def ours() -> list[int]:
            return [self._store(reserve, same_sizes) for _ in range(trips)]

        def echoes() -> list[int]:
            pairs = zip(*(self._echo.trips_ns(request, trips) for request in same_sizes), strict=True)
            return [sum(pair) for pair in pairs]

        return self._compare(ours, echoes)

    def _store(self, reserve: bytes, same_sizes: list[bytes]) -> int:
        """-> ns for RESERVE and COMMIT of 16 new chunks; the first time enters `same_sizes` for the echo"""
        clock = time.perf_counter_ns
        began = clock()
        answer = self._wire.trip(reserve)
        reserved_ns = clock() - began
        reserved = decode_reply(answer)
        assert isinstance(reserved, m.Reserved), reserved
        commit = encode(
            m.Commit(
                id=1,
                session=self.filler.session.session,
                hashes=self.filler.new_hashes(COMMIT_CHUNKS),
                slots=pack_slot_names(split_slot_refs(reserved.slots)),
            )
        )
        began = clock()
        committed = self._wire.trip(commit)
        committed_ns = clock() - began
        if not same_sizes:
            assert isinstance(decode_reply(committed), m.Committed), decode_reply(committed)
            same_sizes.append(echo_request(len(reserve), len(answer)))
            same_sizes.append(echo_request(len(commit), len(committed)))
        return reserved_ns + committed_ns

    def _compare(self, ours: Callable[[], list[int]], echoes: Callable[[], list[int]]) -> dict:
        before_ns = {name: cpu_ns(pid)["main"] for name, pid in self._pids.items()}
        ours_ns, echoes_ns = interleaved(ours, echoes, self.rounds)
        times = (self.rounds + 1) * len(ours_ns[0])
        return {
            "server_us": latency_us(ours_ns),
            "echo_us": latency_us(echoes_ns),
            "ratio_p50": ratio(ours_ns, echoes_ns),
            "cpu_us": {
                name: round((cpu_ns(pid)["main"] - before_ns[name]) / 1_000 / times, 1)
                for name, pid in self._pids.items()
            },
        }


def measure(*, quick: bool) -> dict:
    with workplace() as place:
        server = Server(place, "latency", "1GiB")
        bench = Bench(place, server, quick=quick)
        filler = bench.filler
        filler.fill(4 * LOOKUP_KEYS)
        server.wait_populated()
        hit = filler.prompts[0]
        miss = filler.new_hashes(LOOKUP_KEYS)
        half = hit[: len(hit) // 2] + miss[len(miss) // 2 :]
        figures = {
            "ping": bench.request(m.Ping(id=1, session=filler.session.session, seq=1)),
            "lookup_512_hit": bench.request(filler.lookup(hit)),
            "lookup_512_miss": bench.request(filler.lookup(miss)),
            "lookup_512_half": bench.request(filler.lookup(half)),
            "reserve_commit_16": bench.reserve_commit(),
        }
        filler.reserve(STOCK_SLOTS)  # an engine keeps some in stock for what it computes next
        figures["reserve_commit_16_stocked"] = bench.reserve_commit()
        bench.close()
        server.kill()
        figures["reserve_commit_16_evicting"] = _evicting(place, quick=quick)
    return figures


def _evicting(place: Workplace, *, quick: bool) -> dict:
    """Into a full arena: chunks have to leave for those that come."""
    server = Server(place, "full", FULL_CAPACITY)
    bench = Bench(place, server, quick=quick)
    server.wait_populated()
    while not server.status()["chunks"]["evicted"]:
        bench.filler.fill(bench.filler.chunks + LOOKUP_KEYS)
    figures = bench.reserve_commit()
    bench.close()
    server.kill()
    return figures


def summary(figures: dict) -> list[tuple[str, str]]:
    return [(name, _line(row["server_us"], row["echo_us"], row)) for name, row in figures.items()]


def _line(ours: dict, echo: dict, row: dict) -> str:
    ratio_p50, cpu_us = row["ratio_p50"], row["cpu_us"]
    return (
        f"p50 {ours['p50']} p99 {ours['p99']} us; echo p50 {echo['p50']} p99 {echo['p99']}; "
        f"ratio {ratio_p50['median']} ({ratio_p50['least']}..{ratio_p50['most']}); "
        f"cpu {cpu_us['server']}, echo {cpu_us['echo']} us"
    )
