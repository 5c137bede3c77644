"""Where the chunks of whole prefixes lie, packed as LOOKUP answers it.  Pure.

A prompt mostly ends where an earlier one did, or a few chunks further on: the slots of the prefixes that were
found last are kept, so that not every chunk is visited again.  That a chunk lies where it lies for as long as
it is stored, and is stored under the same parent, is the index's rule.
"""

from collections import OrderedDict
from typing import Generic, Protocol, Self, TypeVar

TRAIL_BYTES_MAX = 4 << 20  # of all together: 400 prefixes of 512 chunks


class Link(Protocol):
    ref: bytes  # its slot
    trail: bytes  # all slots from the first on to its own, or nothing

    @property
    def parent(self) -> Self | None: ...


L = TypeVar("L", bound=Link)


class Trails(Generic[L]):
    def __init__(self, bytes_max: int = TRAIL_BYTES_MAX) -> None:
        self.bytes = 0
        self._bytes_max = bytes_max
        self._ends: OrderedDict[L, None] = OrderedDict()  # the one used last comes last

    def to(self, end: L) -> bytes:
        if end.trail:
            self._ends.move_to_end(end)
            return end.trail
        refs: list[bytes] = []
        link: L | None = end
        while link is not None and not link.trail:
            refs.append(link.ref)
            link = link.parent
        refs.reverse()
        trail = (link.trail if link is not None else b"") + b"".join(refs)
        self._keep(end, trail)
        return trail

    def drop(self, link: L) -> None:
        """It is no longer stored."""
        if link.trail:
            del self._ends[link]
            self.bytes -= len(link.trail)
            link.trail = b""

    def _keep(self, end: L, trail: bytes) -> None:
        end.trail = trail
        self._ends[end] = None
        self.bytes += len(trail)
        while self.bytes > self._bytes_max:
            self.drop(next(iter(self._ends)))
