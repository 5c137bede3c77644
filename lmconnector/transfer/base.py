"""What a copy engine does: bytes between the engine's paged KV cache and parts of chunks in the arena.

The engine's thread calls `load`, `load_beside`, `store` and `clear`; one other thread calls `attach` and
`detach`.  A call that names bytes which do not exist raises `ValueError` before anything is copied.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from lmconnector.arena import ArenaMap

CLOSE_S = 2.0  # vLLM gives a worker 5 s to end, and the heartbeat has to end as well


class Copy(NamedTuple):
    """Some blocks of one chunk, in one cache group."""

    part: torch.Tensor  # bytes: this rank's part of the chunk, a view of `ArenaMap.bytes`
    group: int
    first: int  # which block of the chunk the first of `blocks` is; the others follow it
    blocks: tuple[int, ...]  # the engine's ids of them, in any order


class Ticket(Protocol):
    """Copies under way; a `concurrent.futures.Future` is one."""

    def done(self) -> bool: ...

    def cancel(self) -> bool:
        """Calls off what has not begun; true: no byte has moved, nor will."""

    def result(self) -> int:
        """Waits until no byte moves any more; raises what went wrong.  -> for how long they moved, in us"""


class Transfer(Protocol):
    def attach(self, arena: ArenaMap) -> None:
        """A new mapping: makes it fast to copy from and to.  May take long, and never raises: the copies are
        right without it.  Not before the engine has warmed up: a GPU's graphs can't be captured meanwhile."""

    def detach(self, arena: ArenaMap) -> None:
        """A mapping will be dropped.  Copies that are under way in it are waited for."""

    def load(self, copies: Sequence[Copy]) -> Ticket:
        """Arena -> KV cache, over before whatever the engine computes next."""

    def load_beside(self, copies: Sequence[Copy]) -> Ticket:
        """Arena -> KV cache, beside the engine's steps: nobody uses the blocks before the ticket is done."""

    def store(self, copies: Sequence[Copy]) -> Ticket:
        """KV cache -> arena, as the engine has computed it so far.  Until the ticket is done nobody may write
        to the blocks."""

    def clear(self, blocks: Sequence[int]) -> None:
        """Zeroes these blocks in all regions, before whatever the engine computes next: what a load that
        failed half way has left there may read as NaN.  A `load_beside` into them must have ended."""

    def close(self) -> bool:
        """Waits for the copies under way, and lets mappings go, for `CLOSE_S` in all: the rest ends with the
        process.  A copy that has not begun ends as cancelled.  -> whether no byte moves any more"""
