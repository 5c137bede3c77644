"""Planted bugs in the cache server, for the whole system's simulation."""

from collections.abc import Sequence

import msgspec

from cache_server.arena import Arena
from cache_server.chunks import Books, Chunks
from cache_server.index import Admission, Chunk, Index, Space
from cache_server.leases import Leases
from cache_server.limits import Limits
from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef
from cache_server.service import Service
from cache_server.storage import Storage
from cache_server.workers import Engine, Member, Registry, _shapes


class CommitsForAnybody(Arena):
    def owns(self, owner: bytes, generation: int, number: int) -> bool:
        return number in self.reserved.get(owner, {})


class ReusesGenerations(Arena):
    def _reserve_in(self, slab: object, count: int, owner: bytes, refs: list[SlotRef]) -> None:
        super()._reserve_in(slab, count, owner, refs)
        self._last_generation = self._last_generation // 8 * 8


class FreesReservedSlotsAtStart(Arena):
    """What engines that live still write into."""

    def _adopt_slots(self, slab: object, slot_bytes: int) -> None:
        super()._adopt_slots(slab, slot_bytes)
        for owner in list(self.reserved):
            for number in list(self.reserved.get(owner, {})):
                if self.slab_of(number) is slab:
                    self.abort(owner, number)


class ForgetsSlotsAtStart(Arena):
    def _adopt(self, slab: object) -> None:
        super()._adopt(slab)
        self.inherited = self.inherited[:1]


class LeaksSlots(Arena):
    def abort(self, owner: bytes, number: int) -> None:
        self._write(number, 0, self._unreserve(owner, number), bytes(16))


class ReclaimsFromTheSilent(Registry):
    """Silence is death."""

    def dead_owners(
        self, owners: set[bytes], locked: frozenset[str], now_ms: int, grace_ms: int
    ) -> list[bytes]:
        silent = {
            engine.owner
            for engine in self.engines.values()
            if all(now_ms - member.heard_ms > 1_000 for member in engine.members.values())
        }
        living = frozenset(name for name in locked if bytes.fromhex(name.partition(".")[0]) not in silent)
        return super().dead_owners(owners, living, now_ms, 0)


class ReclaimsWithTheFirstDead(Registry):
    def dead_owners(
        self, owners: set[bytes], locked: frozenset[str], now_ms: int, grace_ms: int
    ) -> list[bytes]:
        dead = {
            engine.owner
            for engine in self.engines.values()
            if not all(member.registration.proof in locked for member in engine.members.values())
        }
        living = frozenset(name for name in locked if bytes.fromhex(name.partition(".")[0]) not in dead)
        return super().dead_owners(owners, living, now_ms, grace_ms)


class GivesNoGrace(Registry):
    def dead_owners(
        self, owners: set[bytes], locked: frozenset[str], now_ms: int, grace_ms: int
    ) -> list[bytes]:
        return super().dead_owners(owners, locked, now_ms, 0)


class NeverReclaims(Registry):
    def dead_owners(
        self, owners: set[bytes], locked: frozenset[str], now_ms: int, grace_ms: int
    ) -> list[bytes]:
        return []


class EvictsTheLeased(Index):
    def lease(self, chunk: Chunk) -> None:
        chunk.leases += 1

    def unlease(self, chunk: Chunk) -> None:
        chunk.leases -= 1


class ReplacesWhatIsThere(Index):
    """The newer chunk of that key."""

    def admit(self, space: Space, hash_: bytes, parent_hash: bytes, slot: SlotRef) -> Chunk | Admission:
        space.chunks.pop(hash_, None)
        return super().admit(space, hash_, parent_hash, slot)


class KnowsNoPrefix(Index):
    """Any chunk of it will do."""

    def longest_prefix(self, spaces: Sequence[Space], hashes: Sequence[bytes]) -> int:
        length = super().longest_prefix(spaces, hashes)
        return length and len(hashes)


class MixesUpGroups(Storage):
    def commit(
        self, space: Space, owner: bytes, parent_hash: bytes, chunks: Sequence[tuple[bytes, tuple[int, int]]]
    ) -> bytes:
        names = [name for _, name in chunks]
        shuffled = [(hash_, name) for (hash_, _), name in zip(chunks, reversed(names), strict=True)]
        return super().commit(space, owner, parent_hash, shuffled)


class ClearsHalf(Storage):
    def _drop(self, roots: Sequence[Chunk]) -> int:
        family = self.index.family(roots)
        self.index.drop(family)
        for chunk in family[1:]:
            self.arena.free(chunk.slot)
        return len(family)


class ReleasesNothing(Leases):
    def release(self, engine: str, request: str) -> bool:
        return False


class LeasesLastForEver(Leases):
    def expire(self, now_ms: int) -> None:
        pass


class NeverSaysBusy(Leases):
    def may_grant(self, engine: str, request: str, per_engine_max: int) -> bool:
        return True


class LeasesNothing(Leases):
    def grant(self, engine: str, request: str, chunks: Sequence[Chunk], now_ms: int) -> None:
        super().grant(engine, request, [], now_ms)


class StocksWithoutABound(Limits):
    def check_stock(self, arena: Arena, owner: bytes, slot_bytes: int, count: int) -> None:
        pass


class KnowsEverybody(Service):
    def _ping(self, ping: m.Ping, now_ms: int) -> m.Pong:
        return msgspec.structs.replace(super()._ping(ping, now_ms), known=True)


class IgnoresEpochs(Chunks):
    """What was stored with other weights is found."""

    def lookup(self, request: m.Lookup, engine: Engine, books: Books, now_ms: int) -> m.Found:
        return super().lookup(msgspec.structs.replace(request, epoch=0), engine, books, now_ms)

    def commit(self, request: m.Commit, engine: Engine, books: Books) -> m.Committed:
        return super().commit(msgspec.structs.replace(request, epoch=0), engine, books)


class CommitsToTheFirstGroup(Chunks):
    def commit(self, request: m.Commit, engine: Engine, books: Books) -> m.Committed:
        return super().commit(msgspec.structs.replace(request, group=0), engine, books)


class MisplacesWindows(Chunks):
    """As if they began where the prompt does."""

    def lookup(self, request: m.Lookup, engine: Engine, books: Books, now_ms: int) -> m.Found:
        found = super().lookup(request, engine, books, now_ms)
        return msgspec.structs.replace(found, groups=tuple(m.Part(0, part.slots) for part in found.groups))


class LeasesUnderAnotherName(Chunks):
    """Whoever asked can't give it back."""

    def lookup(self, request: m.Lookup, engine: Engine, books: Books, now_ms: int) -> m.Found:
        again = msgspec.structs.replace(request, request=f"{request.request} {now_ms}")
        return super().lookup(again, engine, books, now_ms)


class ServesHalfAnEngine(Registry):
    """Before all of its ranks are there."""

    def register(self, registration: m.Register, now_ms: int) -> Member:
        member = super().register(registration, now_ms)
        engine = self.engines[registration.engine]
        workers = [one.registration for one in engine.members.values() if one.registration.layout]
        if engine.incomplete and workers:
            engine.namespace, engine.incomplete = workers[0].namespace, ""
            engine.shapes = _shapes(
                [
                    msgspec.structs.replace(
                        one, layout=msgspec.structs.replace(one.layout, part=part, parts=len(workers))
                    )
                    for part, one in enumerate(workers)
                ]
            )
        return member


class MixesNamespaces(Registry):
    def register(self, registration: m.Register, now_ms: int) -> object:
        member = super().register(registration, now_ms)
        for engine in self.engines.values():
            engine.namespace = b"everybody's"
        return member
