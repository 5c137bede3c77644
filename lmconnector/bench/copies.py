"""Loads and stores by the connector's own copy engine beside a plain memcpy of the same bytes, in turn.

It copies between a KV cache of its own and slots that it has reserved: nobody's chunks are touched.  With a
GPU the KV cache is there, and the plain copy is one of pinned memory.
"""

import random
import time
from collections.abc import Callable, Iterator

import torch

from cache_server.protocol import messages as m
from lmconnector.arena import ArenaMap
from lmconnector.bench.rows import Row, beside
from lmconnector.doctor.memory import usual_slot_bytes
from lmconnector.doctor.visit import Visit
from lmconnector.geometry import GroupLayout
from lmconnector.transfer import Copy, new_transfer

BYTES_MAX = 64 << 20
CAPACITY_SHARE = 16  # it copies one part in so many of the arena at most: an engine may hold twice that
BLOCKS_PER_CHUNK = 16
POOLS = 4  # the KV cache is so many times as large as what is copied
ROUNDS = 11
SEED = 1


def rows(visit: Visit, registered: m.Registered) -> Iterator[Row]:
    """Raises `RegistrationError` for an arena that can't be mapped, `RefusedError` without free slots."""
    arena = ArenaMap.open(registered.arena)
    slot_bytes = usual_slot_bytes(arena)
    visit.register(slot_bytes)
    size = min(BYTES_MAX, registered.arena.capacity_bytes // CAPACITY_SHARE)
    slots = visit.reserve(max(1, size // slot_bytes))
    parts = [arena.bytes[slot.offset : slot.offset + slot_bytes] for slot in slots]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    page_bytes = slot_bytes // BLOCKS_PER_CHUNK
    blocks = POOLS * BLOCKS_PER_CHUNK * len(parts)
    cache = torch.ones(blocks, page_bytes, dtype=torch.uint8, device=device)
    plain = torch.ones(len(parts) * slot_bytes, dtype=torch.uint8, device=device)
    staged = torch.ones(len(plain), dtype=torch.uint8, pin_memory=device == "cuda")
    picked = random.Random(SEED).sample(range(blocks), BLOCKS_PER_CHUNK * len(parts))  # noqa: S311
    copies = [
        Copy(part, 0, 0, tuple(picked[at * BLOCKS_PER_CHUNK : (at + 1) * BLOCKS_PER_CHUNK]))
        for at, part in enumerate(parts)
    ]
    transfer = new_transfer([cache], [GroupLayout(1, BLOCKS_PER_CHUNK, 0)])
    try:
        shape = f"{len(parts)} x {slot_bytes >> 10} KiB on {device}"
        for name, ours, other in (
            ("store", lambda: transfer.store(copies).result(), lambda: staged.copy_(plain)),
            ("load", lambda: transfer.load(copies).result(), lambda: plain.copy_(staged)),
        ):
            yield _in_turn(f"{name}, {shape}", len(plain), ours, other)
    finally:
        transfer.close()


def _in_turn(name: str, size: int, ours: Callable[[], object], other: Callable[[], object]) -> Row:
    speeds: list[float] = []
    others: list[float] = []
    for number in range(ROUNDS + 1):  # the first touches pages
        pair = _gb_s(ours, size), _gb_s(other, size)
        if number:
            speeds.append(pair[0])
            others.append(pair[1])
    return beside(name, "GB/s", speeds, "memcpy", others)


def _gb_s(copy: Callable[[], object], size: int) -> float:
    began_ns = time.perf_counter_ns()
    copy()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return size / (time.perf_counter_ns() - began_ns)
