"""What the server does with each request: `handle(request, now)` -> reply.  Pure.

Whatever it is asked it answers, with the thing or with a typed refusal; a refusal changes nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hmac import compare_digest

from cache_server.admission import check_registration, check_version
from cache_server.chunks import Books, Chunks, refuse_incomplete
from cache_server.counters import Counters
from cache_server.leases import Leases
from cache_server.limits import Limits, RefusedError
from cache_server.protocol import messages as m
from cache_server.protocol.keys import split_slot_names
from cache_server.protocol.messages import Code, Outcome
from cache_server.storage import Storage
from cache_server.workers import Engine, Member, Registry, Seen, mark_of


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
        self.traffic, self.canaries = (
            Books(Counters(), Leases(storage.index, limits.lease_ms)) for _ in range(2)
        )
        self.counters, self.leases = self.traffic.counters, self.traffic.leases
        self._chunks = Chunks(identity.boot, storage, limits, registry)
        self.draining = False
        self.paused = False
        self.stored_ms: int | None = None  # the last chunk committed, and the last found
        self.found_ms: int | None = None
        self._is_locked = is_locked

    @property
    def boot(self) -> int:
        return self.identity.boot

    def handle(self, request: m.Request, now_ms: int) -> m.Reply:
        try:
            return self._answer(request, now_ms)
        except RefusedError as refusal:
            member = self.registry.member(getattr(request, "session", 0))
            if member is not None:
                member[1].was_refused(refusal.code, refusal.detail, now_ms)
            return self.refuse(request.id, refusal.code, refusal.detail, self.books_of(request))

    def books_of(self, request: m.Request) -> Books:
        """Where the request is counted."""
        if isinstance(request, m.Register):
            return self.canaries if m.CANARY in request.features else self.traffic
        member = self.registry.member(getattr(request, "session", 0))
        return self._books(member[0]) if member else self.traffic

    def refuse(self, id: int, code: str, detail: str, books: Books | None = None) -> m.Refused:  # noqa: A002
        (books or self.traffic).counters.refuse(code)
        return m.Refused(id=id, boot=self.boot, code=code, detail=detail)

    def tick(self, now_ms: int) -> None:
        for books in (self.traffic, self.canaries):
            books.leases.expire(now_ms)
        self.storage.hand_over()

    def observe(self, seen: Seen, now_ms: int) -> list[str]:
        """`seen` at this moment, not a little earlier, or a process that has just registered would look dead.
        -> the engines found gone, all that they held taken back"""
        self.registry.observe(seen.living, now_ms)
        witnessed = {mark_of(name) for name in seen.known}
        owners = {owner for owner in self._owners() if owner.hex() in witnessed}
        gone: list[str] = []
        for owner in self.registry.dead_owners(owners, seen.living, now_ms, self.limits.reclaim_grace_ms):
            engine = self.registry.remove(owner)
            books = self._books(engine) if engine else self.traffic
            slots = self.storage.abort_all(owner)
            books.counters.engines_gone += 1
            books.counters.reclaimed_slots += slots
            if engine is not None:
                self._forget(engine)
            gone.append(f"{engine.name if engine else owner.hex()} ({slots} slots came back)")
        return gone

    def spent_proofs(self, seen: Seen) -> list[str]:
        """The files of the dead that may be removed.  A successor that finds an engine's slots reserved needs
        one of them for the proof that it is dead, unless another of its processes lives."""
        needed = {owner.hex() for owner in self._owners()} - {mark_of(name) for name in seen.living}
        return [name for name in sorted(seen.dead) if mark_of(name) not in needed]

    def _owners(self) -> set[bytes]:
        """Who has registered, or has slots reserved."""
        return {engine.owner for engine in self.registry.engines.values()} | set(self.storage.arena.reserved)

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
                member.hear(now_ms, self.limits.silent_after_ms)
                return self._answer_member(request, engine, member, now_ms)
            case _:
                raise RefusedError(Code.UNKNOWN_OP, type(request).__name__)

    def _answer_member(
        self,
        request: m.Unregister | m.Lookup | m.Release | m.Reserve | m.Commit | m.Abort,
        engine: Engine,
        member: Member,
        now_ms: int,
    ) -> m.Reply:
        books = self._books(engine)
        match request:
            case m.Lookup():
                self._refuse_when_closed(canary=engine.canary)
                found = self._chunks.lookup(request, engine, books, now_ms)
                if found.chunks:
                    member.found_ms = now_ms
                    self.found_ms = self.found_ms if engine.canary else now_ms
                return found
            case m.Release():
                released = sum(books.leases.release(engine.name, name) for name in request.requests)
                return m.Done(id=request.id, boot=self.boot, count=released)
            case m.Reserve():
                self._refuse_when_closed(canary=engine.canary)
                return self._chunks.reserve(request, engine, books)
            case m.Commit():
                committed = self._chunks.commit(request, engine, books)
                if Outcome.STORED in committed.outcomes:
                    member.stored_ms = now_ms
                    self.stored_ms = self.stored_ms if engine.canary else now_ms
                return committed
            case m.Abort():
                abort = self.storage.abort_all if request.all_but else self.storage.abort
                count = abort(engine.owner, split_slot_names(request.slots))
                books.counters.aborted_slots += count
                return m.Done(id=request.id, boot=self.boot, count=count)
            case m.Unregister():
                return self._unregister(request)

    def _ping(self, ping: m.Ping, now_ms: int) -> m.Pong:
        found = self.registry.member(ping.session)
        silence_ms = 0
        if found is not None:
            member = found[1]
            silence_ms = now_ms - member.pinged_ms
            member.hear(now_ms, self.limits.silent_after_ms)
            member.pinged_ms = now_ms
            member.pings += 1
            member.progress = ping.progress
            member.enter(ping.phase, now_ms)
        return m.Pong(
            id=ping.id,
            boot=self.boot,
            seq=ping.seq,
            known=found is not None,
            state="draining" if self.draining or self.paused else "ready",
            progress=self.counters.served,
            silence_ms=silence_ms,
        )

    def _register(self, request: m.Register, now_ms: int) -> m.Registered:
        check_version(request)
        self._refuse_when_closed(canary=m.CANARY in request.features)
        check_registration(request, self.registry, self.limits, self._is_locked)
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
            self._forget(left)
        return m.Done(id=request.id, boot=self.boot, count=1)

    def _clear(self, request: m.Clear) -> m.Done:
        spaces, counters = self.storage.index.spaces, self.counters
        if not request.token and request.session:
            engine, _ = self._member(request.session)
            refuse_incomplete(engine)  # its keys can't be known
            mine, counters = engine.prefix(request.epoch), self._books(engine).counters
            spaces = [space for space in spaces if space.prefix == mine]
        elif not compare_digest(request.token.encode(), self.identity.token.encode()):
            raise RefusedError(
                Code.DENIED, "CLEAR wants a session, or the token in the runtime dir's file `token`"
            )
        count = self.storage.clear(spaces)
        counters.cleared_chunks += count
        return m.Done(id=request.id, boot=self.boot, count=count)

    def _member(self, session: int) -> tuple[Engine, Member]:
        found = self.registry.member(session)
        if found is None:
            raise RefusedError(Code.UNKNOWN_SESSION, f"session {session}: REGISTER again")
        return found

    def _refuse_when_closed(self, *, canary: bool) -> None:
        if self.draining:
            raise RefusedError(Code.DRAINING, "the server is about to stop")
        if self.paused and not canary:
            raise RefusedError(Code.DRAINING, "the server is paused")

    def _books(self, engine: Engine) -> Books:
        return self.canaries if engine.canary else self.traffic

    def _forget(self, engine: Engine) -> None:
        """The engine has left."""
        self._books(engine).leases.release_all(engine.name)
        if engine.canary and not self.registry.canaries:
            self.storage.drop_canaries(self._chunks.sizes_in_use())
