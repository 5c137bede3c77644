"""What the server bounds, each with its unit; beyond a bound a request is refused, never queued.  Pure."""

from dataclasses import dataclass

from cache_server.arena import Arena
from cache_server.protocol.messages import Code


class RefusedError(Exception):
    """Raised while answering, before anything has changed."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


CLEAR_MS_MAX = 60_000  # to drop millions of chunks


@dataclass(frozen=True, slots=True)
class Limits:
    lease_ms: int = 30_000
    silent_after_ms: int = 5_000
    reclaim_grace_ms: int = 500
    members_max: int = 4_096
    canaries_max: int = 8
    leases_per_engine_max: int = 16_384
    stock_bytes_max: int = 1 << 30  # one engine's reserved slots
    reserved_bytes_max: int = 4 << 30  # all engines', those in quarantine included

    def check_stock(self, arena: Arena, owner: bytes, slot_bytes: int, count: int, chunk_bytes: int) -> None:
        """`chunk_bytes`: of a chunk's slots in all groups: none may take what the others need."""
        if slot_bytes > arena.slot_bytes_max:
            raise RefusedError(
                Code.TOO_LARGE,
                f"a slot of {slot_bytes} bytes; this arena takes {arena.slot_bytes_max} at most: "
                "give the server more capacity or the engine smaller chunks",
            )
        if chunk_bytes * count > self.stock_bytes_max:
            raise RefusedError(
                Code.TOO_LARGE,
                f"{count} slots at once, for as many chunks of {chunk_bytes} bytes; "
                f"an engine may hold {self.stock_bytes_max} bytes reserved",
            )
        wanted = slot_bytes * count
        mine = arena.reserved_bytes(owner)
        if mine + wanted > self.stock_bytes_max:
            raise RefusedError(
                Code.BUSY,
                f"{mine} bytes are in your stock; with {wanted} more it passes {self.stock_bytes_max}",
            )
        reserved = arena.all_reserved_bytes()
        if reserved + wanted > self.reserved_bytes_max:
            raise RefusedError(
                Code.BUSY,
                f"{reserved} bytes are reserved or in quarantine; "
                f"with {wanted} more that passes {self.reserved_bytes_max}",
            )
