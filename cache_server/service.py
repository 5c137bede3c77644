"""What the server does with each request: `handle(request, now)` -> reply.  Pure.

Whatever it is asked it answers, with the thing or with a typed refusal; a refusal changes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hmac import compare_digest

from cache_server.counters import Counters
from cache_server.leases import Leases
from cache_server.limits import Limits, RefusedError
from cache_server.protocol import messages as m
from cache_server.protocol.keys import SLOT_REF, Hashes, owner_of, split_slot_names
from cache_server.protocol.messages import Code, Outcome
from cache_server.storage import Shortage, Storage
from cache_server.workers import Engine, GroupShape, Member, Registry


@dataclass(frozen=True, slots=True)
class Identity:
    """What this start of the server tells everybody of itself."""

    boot: int
    token: str
    arena: m.Arena


class Service:
    def __init__(
        self,
        identity: Identity,
        storage: Storage,
        limits: Limits,
        registry: Registry,
        is_locked: Callable[[str], bool],
    ) -> None:
        self.identity = identity
        self.storage = storage
        self.limits = limits
        self.registry = registry
        self.leases = Leases(storage.index, limits.lease_ms)
        self.counters = Counters()
        self.draining = False
        self._is_locked = is_locked

    @property
    def boot(self) -> int:
        return self.identity.boot

    def handle(self, request: m.Request, now_ms: int) -> m.Reply:
        try:
            return self._answer(request, now_ms)
        except RefusedError as refusal:
            return self.refuse(request.id, refusal.code, refusal.detail)

    def refuse(self, id: int, code: str, detail: str) -> m.Refused:  # noqa: A002
        self.counters.refuse(code)
        return m.Refused(id=id, boot=self.boot, code=code, detail=detail)

    def tick(self, now_ms: int) -> None:
        self.leases.expire(now_ms)

    def observe(self, locked: frozenset[str], now_ms: int) -> list[str]:
        """`locked`: the presence files that are held at this moment, not a little earlier, or a process that
        has just registered would look dead.  -> the engines found gone, all that they held taken back"""
        self.registry.observe(locked)
        owners = {engine.owner for engine in self.registry.engines.values()} | set(
            self.storage.arena.reserved
        )
        gone: list[str] = []
        for owner in self.registry.dead_owners(owners, locked, now_ms, self.limits.reclaim_grace_ms):
            engine = self.registry.remove(owner)
            if engine is not None:
                self.leases.release_all(engine.name)
            slots = self.storage.abort_all(owner)
            self.counters.engines_gone += 1
            self.counters.reclaimed_slots += slots
            gone.append(f"{engine.name if engine else owner.hex()} ({slots} slots came back)")
        return gone

    def _answer(self, request: m.Request, now_ms: int) -> m.Reply:
        match request:
            case m.Ping():
                return self._ping(request, now_ms)
            case m.Register():
                return self._register(request, now_ms)
            case m.Clear():
                return self._clear(request)
            case m.Unregister() | m.Lookup() | m.Release() | m.Reserve() | m.Commit() | m.Abort():
                engine, member = self._member(request.session)
                member.heard_ms = now_ms
                return self._answer_member(request, engine, now_ms)
            case _:
                raise RefusedError(Code.UNKNOWN_OP, type(request).__name__)

    def _answer_member(
        self,
        request: m.Unregister | m.Lookup | m.Release | m.Reserve | m.Commit | m.Abort,
        engine: Engine,
        now_ms: int,
    ) -> m.Reply:
        match request:
            case m.Lookup():
                return self._lookup(request, engine, now_ms)
            case m.Release():
                released = sum(self.leases.release(engine.name, name) for name in request.requests)
                return m.Done(id=request.id, boot=self.boot, count=released)
            case m.Reserve():
                return self._reserve(request, engine)
            case m.Commit():
                return self._commit(request, engine)
            case m.Abort():
                abort = self.storage.abort_all if request.all_but else self.storage.abort
                count = abort(engine.owner, split_slot_names(request.slots))
                self.counters.aborted_slots += count
                return m.Done(id=request.id, boot=self.boot, count=count)
            case m.Unregister():
                return self._unregister(request)

    def _ping(self, ping: m.Ping, now_ms: int) -> m.Pong:
        found = self.registry.member(ping.session)
        silence_ms = 0
        if found is not None:
            member = found[1]
            silence_ms = now_ms - member.pinged_ms
            member.heard_ms = member.pinged_ms = now_ms
            member.pings += 1
            member.phase, member.progress = ping.phase, ping.progress
        return m.Pong(
            id=ping.id,
            boot=self.boot,
            seq=ping.seq,
            known=found is not None,
            state="draining" if self.draining else "ready",
            progress=self.counters.served,
            silence_ms=silence_ms,
        )

    def _register(self, request: m.Register, now_ms: int) -> m.Registered:
        if request.version_min > m.VERSION_MAX or request.version_max < m.VERSION_MIN:
            raise RefusedError(
                Code.VERSION,
                f"this server speaks protocol {m.VERSION_MIN}..{m.VERSION_MAX}, "
                f"you speak {request.version_min}..{request.version_max}: update the older side",
            )
        self._refuse_when_draining()
        if request.role == "worker" and request.layout is None:
            raise RefusedError(Code.MALFORMED, "a worker registers with its `layout`")
        if not request.proof.startswith(owner_of(request.engine).hex() + "."):
            raise RefusedError(
                Code.NO_PROOF, "`proof` begins with the engine's owner digest in hex and a dot"
            )
        if not self._is_locked(request.proof):
            raise RefusedError(
                Code.NO_PROOF, f"no process holds a lock on locks/{request.proof}: lock it, then register"
            )
        if len(self.registry) >= self.limits.members_max and not self.registry.has_place_of(request):
            raise RefusedError(
                Code.BUSY, f"{len(self.registry)} processes are registered, the most there can be"
            )
        member = self.registry.register(request, now_ms)
        return m.Registered(
            id=request.id,
            boot=self.boot,
            version=min(m.VERSION_MAX, request.version_max),
            features=tuple(name for name in m.FEATURES if name in request.features),
            session=member.session,
            arena=self.identity.arena,
            lease_ms=self.limits.lease_ms,
            silent_after_ms=self.limits.silent_after_ms,
        )

    def _unregister(self, request: m.Unregister) -> m.Done:
        left = self.registry.unregister(request.session)
        if left is not None:  # what it has reserved comes back when its processes' locks are free
            self.leases.release_all(left.name)
        return m.Done(id=request.id, boot=self.boot, count=1)

    def _lookup(self, request: m.Lookup, engine: Engine, now_ms: int) -> m.Found:
        self._refuse_when_draining()
        self._refuse_incomplete(engine)
        index = self.storage.index
        prefix = engine.prefix(request.epoch)
        spaces = [
            index.space(prefix, group, shape.slot_bytes, shape.window)
            for group, shape in enumerate(engine.shapes)
        ]
        hashes = Hashes(request.hashes)
        length = index.longest_prefix(spaces, hashes)
        if length and not self.leases.may_grant(
            engine.name, request.request, self.limits.leases_per_engine_max
        ):
            raise RefusedError(Code.BUSY, f"{self.leases.of(engine.name)} leases are out: RELEASE some")
        counters = self.counters
        counters.lookups += 1
        counters.chunks_asked += len(hashes)
        if not length:
            self.leases.release(engine.name, request.request)
            return m.Found(id=request.id, boot=self.boot, chunks=0)
        found = [index.use(space, hashes, length) for space in spaces]
        held = [
            chunk
            for space, chunks in zip(spaces, found, strict=True)
            for chunk in (chunks if space.window else chunks[-1:])
        ]
        self.leases.grant(engine.name, request.request, held, now_ms)
        counters.lookup_hits += 1
        counters.chunks_found += length
        counters.found_bytes += sum(
            len(chunks) * space.slot_bytes for space, chunks in zip(spaces, found, strict=True)
        )
        return m.Found(
            id=request.id,
            boot=self.boot,
            chunks=length,
            groups=tuple(
                m.Part(length - len(chunks), b"".join([chunk.ref for chunk in chunks])) for chunks in found
            ),
            part_offsets=tuple(shape.part_offsets for shape in engine.shapes),
            lease_ms=self.limits.lease_ms,
        )

    def _reserve(self, request: m.Reserve, engine: Engine) -> m.Reserved:
        self._refuse_when_draining()
        shape = self._shape(engine, request.group)
        self.limits.check_stock(self.storage.arena, engine.owner, shape.slot_bytes, request.count)
        sizes_in_use = [shape.slot_bytes for each in self.registry.engines.values() for shape in each.shapes]
        slots = self.storage.reserve(shape.slot_bytes, request.count, engine.owner, sizes_in_use)
        if slots is Shortage.POPULATING:
            raise RefusedError(Code.BUSY, f"{slots.value}: ask again in a second")
        if isinstance(slots, Shortage):
            raise RefusedError(
                Code.NO_SPACE, f"{request.count} slots of {shape.slot_bytes} bytes: {slots.value}"
            )
        self.counters.reserved_slots += len(slots)
        return m.Reserved(
            id=request.id,
            boot=self.boot,
            slots=b"".join([SLOT_REF.pack(*slot) for slot in slots]),
            slot_bytes=shape.slot_bytes,
            part_offsets=shape.part_offsets,
        )

    def _commit(self, request: m.Commit, engine: Engine) -> m.Committed:
        shape = self._shape(engine, request.group)
        prefix = engine.prefix(request.epoch)
        space = self.storage.index.space(prefix, request.group, shape.slot_bytes, shape.window)
        chunks = list(zip(Hashes(request.hashes), split_slot_names(request.slots), strict=True))
        outcomes = self.storage.commit(space, engine.owner, request.parent, chunks)
        stored = outcomes.count(Outcome.STORED)
        counters = self.counters
        counters.stored_chunks += stored
        counters.stored_bytes += stored * shape.slot_bytes
        counters.existing_chunks += outcomes.count(Outcome.EXISTS)
        counters.orphan_chunks += outcomes.count(Outcome.ORPHAN)
        counters.foreign_slots += outcomes.count(Outcome.FOREIGN)
        return m.Committed(id=request.id, boot=self.boot, outcomes=outcomes)

    def _clear(self, request: m.Clear) -> m.Done:
        spaces = self.storage.index.spaces
        if not request.token and request.session:
            engine, _ = self._member(request.session)
            self._refuse_incomplete(engine)  # its keys can't be known
            mine = engine.prefix(request.epoch)
            spaces = [space for space in spaces if space.prefix == mine]
        elif not compare_digest(request.token.encode(), self.identity.token.encode()):
            raise RefusedError(
                Code.DENIED, "CLEAR wants a session, or the token in the runtime dir's file `token`"
            )
        count = self.storage.clear(spaces)
        self.counters.cleared_chunks += count
        return m.Done(id=request.id, boot=self.boot, count=count)

    def _member(self, session: int) -> tuple[Engine, Member]:
        found = self.registry.member(session)
        if found is None:
            raise RefusedError(Code.UNKNOWN_SESSION, f"session {session}: REGISTER again")
        return found

    def _shape(self, engine: Engine, group: int) -> GroupShape:
        self._refuse_incomplete(engine)
        if group >= len(engine.shapes):
            raise RefusedError(Code.MALFORMED, f"group {group} of {len(engine.shapes)}")
        return engine.shapes[group]

    def _refuse_incomplete(self, engine: Engine) -> None:
        if engine.incomplete:
            raise RefusedError(Code.INCOMPLETE, f"engine {engine.name}: {engine.incomplete}")

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise RefusedError(Code.DRAINING, "the server is about to stop")
