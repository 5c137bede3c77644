"""What the scheduler's connector knows of one request: one record, one phase.  Pure."""

from dataclasses import dataclass
from enum import Enum

from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef, split_slot_refs

LEASE_NAME_MAX = 256


class Phase(Enum):
    NEW = "new"  # or waiting again after a preemption: may be looked up
    LOOKING = "looking"
    FOUND = "found"  # under a lease
    LOADING = "loading"  # under a lease, and the workers copy
    RUNNING = "running"  # nothing is under way


@dataclass(frozen=True, slots=True)
class Found:
    chunks: int
    slots: tuple[dict[int, SlotRef], ...]  # per group: chunk number -> slot
    build_until_ms: int  # half of its lease is over: what is loaded now would end too late


@dataclass(slots=True)
class Record:
    id: str
    phase: Phase = Phase.NEW
    hashes: tuple[bytes, ...] = ()  # of the chunks that were looked up
    attempt: int = 0  # at looking it up; a late reply to an earlier one is no news
    waited: bool = False  # a step has waited for the lookup once: enough
    found: Found | None = None
    local_tokens: int = 0  # the engine's own when the hit was offered
    refuses_hits: bool = False  # a load failed: it is not offered one again
    stored_chunks: int = 0  # those before are in the cache or on their way
    stores_end: bool = False  # one was dropped: what follows it could not be found
    workers_left: int = 0  # that have not reported its load yet

    @property
    def lease(self) -> str:
        return f"{self.attempt}#{self.id}"[:LEASE_NAME_MAX]


def found_of(reply: m.Found, now_ms: int) -> Found:
    slots = tuple(dict(enumerate(split_slot_refs(part.slots), part.first)) for part in reply.groups)
    return Found(reply.chunks, slots, now_ms + reply.lease_ms // 2)
