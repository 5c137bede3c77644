"""Who was promised that which chunks stay where they are, and until when.  Pure."""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from cache_server.index import Chunk, Index


@dataclass(slots=True)
class Lease:
    chunks: Sequence[Chunk]  # the last of each chain: it holds all before it; every one of a window
    expires_ms: int


class Leases:
    """All leases last equally long, so the table's order is the order in which they end."""

    def __init__(self, index: Index, lease_ms: int) -> None:
        self.granted = 0
        self.released = 0
        self.expired = 0
        self._index = index
        self._lease_ms = lease_ms
        self._leases: OrderedDict[tuple[str, str], Lease] = OrderedDict()  # (engine, request)
        self._per_engine: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._leases)

    def of(self, engine: str) -> int:
        return self._per_engine[engine]

    def may_grant(self, engine: str, request: str, per_engine_max: int) -> bool:
        """A lease that takes another's place is no more."""
        return self._per_engine[engine] < per_engine_max or (engine, request) in self._leases

    def grant(self, engine: str, request: str, chunks: Sequence[Chunk], now_ms: int) -> None:
        """Takes the place of an earlier lease of that name."""
        for chunk in chunks:
            self._index.lease(chunk)
        self.release(engine, request)
        self._leases[engine, request] = Lease(chunks, now_ms + self._lease_ms)
        self._per_engine[engine] += 1
        self.granted += 1

    def release(self, engine: str, request: str) -> bool:
        lease = self._leases.pop((engine, request), None)
        if lease is None:
            return False
        self._end(engine, lease)
        self.released += 1
        return True

    def release_all(self, engine: str) -> None:
        if self._per_engine[engine]:
            for name in [name for name in self._leases if name[0] == engine]:
                self.release(*name)
        del self._per_engine[engine]

    def expire(self, now_ms: int) -> None:
        while self._leases:
            (engine, request), lease = next(iter(self._leases.items()))
            if lease.expires_ms > now_ms:
                return
            del self._leases[engine, request]
            self._end(engine, lease)
            self.expired += 1

    def _end(self, engine: str, lease: Lease) -> None:
        self._per_engine[engine] -= 1
        for chunk in lease.chunks:
            self._index.unlease(chunk)
