"""What is being loaded, as far as other requests would share it.  vLLM's scheduler thread only."""

from collections.abc import Callable, Iterable

from lmconnector.metadata import Load, Piece, Plan
from lmconnector.requests import Record, Request


class Loading:
    """The coming step's loads, and the chunks that loads beside the steps bring."""

    def __init__(self, hash_tokens: int, clock: Callable[[], int], patience_ms: int) -> None:
        self._hash_tokens = hash_tokens
        self._clock = clock
        self._patience_ms = patience_ms
        self._loads: list[Load] = []
        self._arenas: set[bytes] = set()  # in which they are
        self._firsts: list[tuple[int, bytes]] = []  # blocks that they load at once, by number and hash
        self._beside: dict[bytes, int] = {}  # chunk -> since when

    def add(self, load: Load, arena: bytes, record: Record, request: Request) -> None:
        self._loads.append(load)
        self._arenas.add(arena)
        if load.at_once:
            first = record.local_tokens // self._hash_tokens
            self._firsts.append((first, request.block_hashes[first]))

    def take(self) -> Plan:
        """The step's plan so far.  Loads that are not all of the arena that a worker knows fail there."""
        plan = Plan(arena=self._arenas.pop() if len(self._arenas) == 1 else b"", loads=self._loads)
        self._loads, self._firsts = [], []
        self._arenas.clear()
        return plan

    def is_shared(self, request: Request, local_tokens: int) -> bool:
        """Whether its local hit is what this step loads at once.

        vLLM gives blocks their hashes before they are loaded, and if that fails has the request that loads
        compute them.  Who shares them would go on from what is not there: that request may be aborted before,
        or computed later."""
        return any(
            first * self._hash_tokens < local_tokens and request.block_hashes[first] == hash_
            for first, hash_ in self._firsts
        )

    def bring(self, pieces: Iterable[Piece]) -> None:
        """Who gives up waiting for a slow load does not make others wait anew."""
        for piece in pieces:
            self._beside.setdefault(piece.hash, self._clock())

    def brings(self, chunk: bytes) -> bool:
        since_ms = self._beside.get(chunk)
        return since_ms is not None and self._clock() - since_ms < self._patience_ms

    def brought(self, chunks: Iterable[bytes]) -> None:
        for chunk in chunks:
            self._beside.pop(chunk, None)
