"""What the scheduler's connector knows of one request: one record, one phase.  Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef, split_slot_refs
from lmconnector.geometry import GroupLayout

LEASE_NAME_MAX = 256
LEASE_MS_MIN = 10  # a shorter one is over before a step takes it up, again and again


class Request(Protocol):
    """What is used of vLLM's request."""

    request_id: str
    num_tokens: int
    num_prompt_tokens: int
    block_hashes: list[bytes]
    skip_reading_prefix_cache: bool


class Phase(Enum):
    LOOKING = "looking"
    FOUND = "found"  # under a lease
    LOADING = "loading"  # the lease is its job's
    RUNNING = "running"  # nothing is under way


@dataclass(frozen=True, slots=True)
class Found:
    chunks: int
    slots: tuple[dict[int, SlotRef], ...]  # per group: chunk number -> slot
    arena: bytes  # in which they are: another one may have others by these names
    build_until_ms: int  # half of its lease is over: what is loaded now would end too late


@dataclass(slots=True)
class Record:
    id: str
    phase: Phase = Phase.RUNNING
    hashes: tuple[bytes, ...] = ()  # of the chunks that were looked up
    attempt: int = 0  # at looking it up; a late reply to an earlier one is no news
    looking_until_ms: int = 0  # whatever becomes of the reply
    arena: bytes = b""  # that is looked into
    found: Found | None = None
    local_tokens: int = 0  # the engine's own when the hit was offered
    beside: bool = False  # the hit was offered as a load beside the steps
    refuses_hits: bool = False  # a load failed: it is not offered one again
    steps_aside: bool = False  # once
    stored_chunks: int = 0  # those before are in the cache or on their way
    unplaced_chunks: int = 0  # computed, and waiting for slots that the server was asked for
    stores_end: bool = False  # one was dropped: what follows it could not be found
    looked_up_at: int = 0  # the number of the last store then

    @property
    def lease(self) -> str:
        return f"{self.attempt}#{self.id}"[:LEASE_NAME_MAX]


def fits(reply: m.Found, asked: int, groups: Sequence[GroupLayout]) -> bool:
    """Whether it can be the answer to a lookup of that many chunks.  Its slots need no trust: workers look at
    their entries."""
    if not reply.chunks:
        return True
    needed_from = [max(0, reply.chunks - group.window) if group.window else 0 for group in groups]
    return (
        reply.chunks <= asked
        and reply.lease_ms >= LEASE_MS_MIN
        and len(reply.groups) == len(groups)
        and all(part.first <= first for part, first in zip(reply.groups, needed_from, strict=True))
    )


def found_of(reply: m.Found, arena: bytes, now_ms: int) -> Found:
    slots = tuple(dict(enumerate(split_slot_refs(part.slots), part.first)) for part in reply.groups)
    return Found(reply.chunks, slots, arena, now_ms + reply.lease_ms // 2)
