"""The arena as this process sees it: mapped, readable as fast as memory, and good for a chunk's round trip.

Nobody's slots are written to but those that the visit has reserved for itself.
"""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from cache_server.protocol import messages as m
from cache_server.protocol.keys import HASH_BYTES
from cache_server.protocol.messages import Code, Outcome
from cache_server.protocol.slots import (
    SLAB_POPULATED,
    SLAB_RAW,
    Geometry,
    read_header,
    read_slab,
)
from lmconnector.arena import ArenaMap
from lmconnector.doctor.findings import Finding, fail, ok, skip, warn
from lmconnector.doctor.machine import memory_lock
from lmconnector.doctor.visit import LOOK, RefusedError, Visit
from lmconnector.errors import RegistrationError

CONTENT_BYTES = 1 << 20
COPY_BYTES = 64 << 20
PIN_BYTES = 4 << 20
COPIES = 5
MOUNTS = Path("/proc/self/mounts")
ESCAPED = re.compile(r"\\(\d{3})")
IN_MEMORY = ("tmpfs", "hugetlbfs", "ramfs")


def findings(visit: Visit, registered: m.Registered) -> Iterator[Finding]:
    finding, mapped = arena(registered)
    yield finding
    if mapped is None:
        return
    yield chunk(visit, mapped)
    yield bandwidth(mapped)
    yield pinning(mapped, memory_lock())


def arena(registered: m.Registered) -> tuple[Finding, ArenaMap | None]:
    told = registered.arena
    try:
        mapped = ArenaMap.open(told)
    except RegistrationError as error:
        advice = (
            "server and engine need one user (or `group`), one mount of the arena, and the same lmconnector"
        )
        return fail("arena", str(error), advice), None
    kind = filesystem(told.path, MOUNTS.read_text())
    found = f"{told.path}: {told.file_bytes >> 20} MiB mapped, id as announced, on {kind}"
    if kind not in IN_MEMORY:
        return warn("arena", found, "each store is written to a disk: put it on a tmpfs or hugetlbfs"), mapped
    return ok("arena", found), mapped


def filesystem(path: str, mounts: str) -> str:
    """The kind of the mount that `path` lies on."""
    best = ("", "an unknown file system")
    for line in mounts.splitlines():
        _, place, kind, *_ = line.split()
        place = ESCAPED.sub(lambda octal: chr(int(octal[1], 8)), place)
        inside = path == place or path.startswith(place.rstrip("/") + "/")
        if inside and len(place) >= len(best[0]):  # of equal ones the later lies on top
            best = (place, kind)
    return best[1]


def usual_slot_bytes(mapped: ArenaMap) -> int:
    """As most slabs are cut: a visitor who asks for another size would make a whole slab change its own."""
    view, geometry = _table(mapped)
    sizes = [read_slab(view, geometry, slab) for slab in range(geometry.slabs)]
    cut = [size for size in sizes if size > SLAB_POPULATED]
    return max(set(cut), key=cut.count) if cut else CONTENT_BYTES


class WrongError(Exception):
    """The chunk did not come back as it went."""


def chunk(visit: Visit, mapped: ArenaMap) -> Finding:
    slot_bytes = usual_slot_bytes(mapped)
    size = min(slot_bytes, CONTENT_BYTES)
    try:
        visit.register(slot_bytes)
        began_s = time.perf_counter()
        cleared = _there_and_back(visit, mapped, size)
    except RefusedError as refusal:
        if refusal.code in (Code.BUSY, Code.NO_SPACE, Code.DRAINING):
            return warn("chunk", str(refusal), "engines drop stores while this is so; more capacity helps")
        return fail("chunk", str(refusal), LOOK)
    except WrongError as error:
        return fail("chunk", str(error), "restart the server with an empty arena: cache-server stop --purge")
    took_ms = 1_000 * (time.perf_counter() - began_s)
    way = "reserved, written, committed, looked up, read back the same"
    return ok("chunk", f"{size >> 10} KiB {way}, {cleared} cleared, in {took_ms:.1f} ms")


def _there_and_back(visit: Visit, mapped: ArenaMap, size: int) -> int:
    """All that an engine does with a chunk, under a hash and in a namespace of its own; -> chunks cleared."""
    content, hash_ = torch.randint(256, (size,), dtype=torch.uint8), os.urandom(HASH_BYTES)
    (slot,) = visit.reserve(1)
    place = mapped.bytes[slot.offset : slot.offset + size]
    place.copy_(content)
    outcome = visit.commit(hash_, slot)
    if outcome != Outcome.STORED:
        raise WrongError(f"COMMIT had outcome {outcome}, expected {Outcome.STORED}")
    found = visit.lookup(hash_)
    if found != slot:
        raise WrongError(f"LOOKUP found {found}, expected {slot}")
    before = mapped.holds(slot, hash_)
    read = place.clone()
    if not (before and mapped.holds(slot, hash_)):
        raise WrongError(f"slot {slot.number}: its entry in the arena does not show the chunk")
    if not torch.equal(read, content):
        raise WrongError(f"slot {slot.number}: other bytes came back than were stored")
    return visit.clear()


def bandwidth(mapped: ArenaMap) -> Finding:
    """Reads only: what is populated, whoever's it is."""
    area = populated(mapped, COPY_BYTES)
    if not len(area):
        return skip("bandwidth", "no memory of the arena is populated yet; ask again in a few seconds")
    private, target = torch.ones_like(area), torch.empty_like(area)
    from_arena = from_private = 0.0
    for _ in range(
        COPIES
    ):  # by turns: whatever else this machine does, it does to both; the first touches pages
        from_arena = max(from_arena, _copy_gb_s(target, area))
        from_private = max(from_private, _copy_gb_s(target, private))
    found = (
        f"{from_arena:.1f} GB/s from the arena, {from_private:.1f} GB/s from private memory, "
        f"{len(area) >> 20} MiB each"
    )
    if from_arena > from_private / 2:
        return ok("bandwidth", found)
    return warn("bandwidth", found, "arena on another NUMA node, or swapped out? bind the server to this one")


def pinning(mapped: ArenaMap, memory_lock: str) -> Finding:
    if not torch.cuda.is_available():
        return ok(
            "pinning", f"no CUDA here, and a KV cache in CPU memory needs none; memory lock {memory_lock}"
        )
    area = populated(mapped, PIN_BYTES)
    if not len(area):
        return skip("pinning", "no memory of the arena is populated yet; ask again in a few seconds")
    cudart = torch.cuda.cudart()
    torch.cuda.init()
    error = int(cudart.cudaHostRegister(area.data_ptr(), len(area), 0))
    if error:
        advice = (
            f"memory lock limit {memory_lock}: raise it (ulimit -l unlimited; docker: --ulimit memlock=-1)"
        )
        return warn("pinning", f"cudaHostRegister of {len(area) >> 20} MiB: CUDA error {error}", advice)
    cudart.cudaHostUnregister(area.data_ptr())
    return ok(
        "pinning", f"cudaHostRegister takes {len(area) >> 20} MiB of the arena; memory lock {memory_lock}"
    )


def populated(mapped: ArenaMap, bytes_max: int) -> torch.Tensor:
    """Of the first slabs in a row that have memory, at most so much: to read the others would fill them."""
    view, geometry = _table(mapped)
    has_memory = [read_slab(view, geometry, slab) != SLAB_RAW for slab in range(geometry.slabs)]
    first = has_memory.index(True) if any(has_memory) else geometry.slabs
    end = has_memory.index(False, first) if False in has_memory[first:] else geometry.slabs
    begin = geometry.slab_at(first)
    return mapped.bytes[begin : begin + min(bytes_max, (end - first) * geometry.slab_bytes)]


def _table(mapped: ArenaMap) -> tuple[memoryview, Geometry]:
    view = memoryview(mapped.bytes.numpy())
    return view, read_header(view)[0]


def _copy_gb_s(target: torch.Tensor, source: torch.Tensor) -> float:
    began_ns = time.perf_counter_ns()
    target.copy_(source)
    return len(source) / (time.perf_counter_ns() - began_ns)
