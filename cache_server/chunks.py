"""What an engine does with chunks: LOOKUP, RESERVE, COMMIT.  Pure."""

import msgspec

from cache_server.counters import Counters
from cache_server.leases import Leases
from cache_server.limits import Limits, RefusedError
from cache_server.protocol import messages as m
from cache_server.protocol.keys import SLOT_REF, Hashes, split_slot_names
from cache_server.protocol.messages import Code, Outcome
from cache_server.storage import Shortage, Storage
from cache_server.workers import Engine, GroupShape, Registry


class Books(msgspec.Struct, frozen=True):
    """What was done for one kind of client; canaries have their own, and never show as traffic."""

    counters: Counters
    leases: Leases


class Chunks:
    def __init__(self, boot: int, storage: Storage, limits: Limits, registry: Registry) -> None:
        self._boot = boot
        self._storage = storage
        self._limits = limits
        self._registry = registry

    def lookup(self, request: m.Lookup, engine: Engine, books: Books, now_ms: int) -> m.Found:
        refuse_incomplete(engine)
        index = self._storage.index
        prefix = engine.prefix(request.epoch)
        spaces = [
            index.space(prefix, group, shape.slot_bytes, shape.window)
            for group, shape in enumerate(engine.shapes)
        ]
        hashes = Hashes(request.hashes)
        length = index.longest_prefix(spaces, hashes)
        leases, counters = books.leases, books.counters
        if length and not leases.may_grant(engine.name, request.request, self._limits.leases_per_engine_max):
            raise RefusedError(Code.BUSY, f"{leases.of(engine.name)} leases are out: RELEASE some")
        counters.lookups += 1
        counters.chunks_asked += len(hashes)
        if not length:
            leases.release(engine.name, request.request)
            return m.Found(id=request.id, boot=self._boot, chunks=0)
        found = [index.use(space, hashes, length) for space in spaces]
        held = [chunk for used in found for chunk in used.ends]
        leases.grant(engine.name, request.request, held, now_ms)
        counters.lookup_hits += 1
        counters.chunks_found += length
        counters.found_bytes += sum(
            used.length * space.slot_bytes for space, used in zip(spaces, found, strict=True)
        )
        return m.Found(
            id=request.id,
            boot=self._boot,
            chunks=length,
            groups=tuple(m.Part(length - used.length, used.refs) for used in found),
            part_offsets=tuple(shape.part_offsets for shape in engine.shapes),
            lease_ms=self._limits.lease_ms,
        )

    def reserve(self, request: m.Reserve, engine: Engine, books: Books) -> m.Reserved:
        shape = shape_of(engine, request.group)
        chunk_bytes = sum(each.slot_bytes for each in engine.shapes)
        arena = self._storage.arena
        self._limits.check_stock(arena, engine.owner, shape.slot_bytes, request.count, chunk_bytes)
        if engine.canary:
            slots = self._storage.reserve_spare(shape.slot_bytes, request.count, engine.owner)
        else:
            sizes = self.sizes_in_use()
            slots = self._storage.reserve(shape.slot_bytes, request.count, engine.owner, sizes)
        if slots is Shortage.POPULATING or slots is Shortage.LEAVING:
            raise RefusedError(Code.BUSY, f"{slots.value}: ask again in a second")
        if isinstance(slots, Shortage):
            raise RefusedError(
                Code.NO_SPACE, f"{request.count} slots of {shape.slot_bytes} bytes: {slots.value}"
            )
        books.counters.reserved_slots += len(slots)
        return m.Reserved(
            id=request.id,
            boot=self._boot,
            slots=b"".join([SLOT_REF.pack(*slot) for slot in slots]),
            slot_bytes=shape.slot_bytes,
            part_offsets=shape.part_offsets,
        )

    def commit(self, request: m.Commit, engine: Engine, books: Books) -> m.Committed:
        shape = shape_of(engine, request.group)
        prefix = engine.prefix(request.epoch)
        space = self._storage.index.space(prefix, request.group, shape.slot_bytes, shape.window)
        chunks = list(zip(Hashes(request.hashes), split_slot_names(request.slots), strict=True))
        outcomes = self._storage.commit(space, engine.owner, request.parent, chunks)
        stored = outcomes.count(Outcome.STORED)
        counters = books.counters
        counters.stored_chunks += stored
        counters.stored_bytes += stored * shape.slot_bytes
        counters.existing_chunks += outcomes.count(Outcome.EXISTS)
        counters.orphan_chunks += outcomes.count(Outcome.ORPHAN)
        counters.foreign_slots += outcomes.count(Outcome.FOREIGN)
        return m.Committed(id=request.id, boot=self._boot, outcomes=outcomes)

    def sizes_in_use(self) -> list[int]:
        engines = self._registry.engines.values()
        return [shape.slot_bytes for each in engines if not each.canary for shape in each.shapes]


def shape_of(engine: Engine, group: int) -> GroupShape:
    refuse_incomplete(engine)
    if group >= len(engine.shapes):
        raise RefusedError(Code.MALFORMED, f"group {group} of {len(engine.shapes)}")
    return engine.shapes[group]


def refuse_incomplete(engine: Engine) -> None:
    if engine.incomplete:
        raise RefusedError(Code.INCOMPLETE, f"engine {engine.name}: {engine.incomplete}")
