"""The scheduler's side: what a prompt finds in the cache, and each step's plan for the workers.

vLLM's scheduler thread only.  One record per request; when the request ends, nothing of it stays but the
copies that workers still make, each a job with its own lease or its own held blocks.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain

from cache_server.protocol import messages as m
from cache_server.protocol.keys import HASH_BYTES
from lmconnector.gate import note_failure
from lmconnector.jobs import Jobs, Kind
from lmconnector.loading import Loading
from lmconnector.metadata import Load, Outcome, Plan
from lmconnector.pace import Pace
from lmconnector.pairing import pieces
from lmconnector.requests import Found, Phase, Record, Request, fits, found_of
from lmconnector.stores import Stores, Surroundings

RELEASES_MAX = 1_000  # leases given back with one message
NO_HIT = (0, False)
ASK_AGAIN = (None, False)
PATIENCE_ALONE = 30  # times as long may a load before the step take that nobody else waits for

# A request, its tokens computed when the step is done, its block ids per group.
Scheduled = tuple[str, int, Callable[[], Sequence[Sequence[int]]]]


class SchedulerSide:
    def __init__(self, around: Surroundings, pace: Pace) -> None:
        self.counts: Counter[str] = Counter()
        self.jobs = Jobs(around.workers)
        self.stores = Stores(around, self.jobs, self.counts)
        self._options = around.options
        self._layout = around.layout
        self._client = around.client
        self._gate = around.gate
        self._clock = around.clock
        self._hybrid = len(around.layout.groups) > 1
        # That a load failed can be told in time only when no step waits for it: of a hybrid model by no other
        # way, and with overlapping steps the next one would already go on from what was not there.
        self._always_beside = self._hybrid or around.steps_overlap
        self._block_tokens = min(group.block_tokens for group in around.layout.groups)
        self._caches_locally = around.caches_locally
        self._pace = pace
        self._records: dict[str, Record] = {}
        self._requests: dict[str, Request] = {}
        self.storing: dict[str, Record] = {}  # those that may still have something to store
        self._blocks = around.blocks
        self._loading = Loading(around.layout.hash_tokens, around.clock, around.options.request_deadline_ms)
        self._releases: list[str] = []
        self._part_offsets: dict[int, tuple[int, ...]] = {}
        self._step_waits_until_ms = 0

    # A request's way

    def on_new_request(self, request: Request) -> None:
        self._requests[request.request_id] = request
        record = Record(request.request_id, looked_up_at=self.stores.settled)
        self._records[record.id] = self.storing[record.id] = record
        self.stores.stock.refill(self._clock())  # what this request computes can be stored in its first step
        self._look_up(record, request)

    def matched_tokens(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond the local ones can be loaded, None: ask again; and if beside the steps."""
        record = self._records.get(request.request_id)
        if self._has_to_wait(record, request, local_tokens):
            return ASK_AGAIN
        if record is None:
            return NO_HIT
        if record.phase is Phase.LOOKING:
            self._wait_for_lookup(record)
        if record.phase is Phase.LOOKING:
            return ASK_AGAIN
        found = record.found
        if record.phase is not Phase.FOUND or found is None:
            return NO_HIT
        if self._clock() >= found.build_until_ms or found.arena != self._gate.arena:
            self._look_up(record, request)  # it has waited for long: is it still there?
            return ASK_AGAIN
        return self._offer(record, found, request, local_tokens)

    def _has_to_wait(self, record: Record | None, request: Request, local_tokens: int) -> bool:
        """For a step, whatever it would be answered."""
        if record is not None and record.steps_aside:
            record.steps_aside = False
            return True
        return self._loading.is_shared(request, local_tokens)

    def on_preempted(self, request_id: str) -> None:
        """It will wait again, and may find more than at first."""
        record, request = self._records.get(request_id), self._requests.get(request_id)
        if record is not None and request is not None and record.phase is Phase.RUNNING:
            self._look_up(record, request)

    def on_allocated(self, request: Request, blocks: Sequence[Sequence[int]], tokens: int) -> None:
        """`blocks` per group; `tokens` of ours are to be loaded into them."""
        record = self._records.get(request.request_id)
        if record is not None and record.phase is Phase.FOUND and record.found is not None:
            self._take_up(record, request, record.found, blocks, tokens)
        else:
            assert not tokens, "vLLM loads what nobody offered"
        if record is not None:
            self.storing[record.id] = record

    def _take_up(
        self, record: Record, request: Request, found: Found, blocks: Sequence[Sequence[int]], tokens: int
    ) -> None:
        record.found, lease = None, record.lease
        if not tokens:
            record.phase = Phase.RUNNING
            self._releases.append(lease)
            return
        record.phase = Phase.LOADING
        kind = Kind.LOAD_BESIDE if record.beside else Kind.LOAD
        load = Load(0, record.id, not record.beside, [])
        end = partial(self._end_load, record, lease, load, blocks[0])
        load.number = self.jobs.begin(kind, self._clock(), end)
        self._loading.add(load, found.arena, record, request)  # now: vLLM counts on these tokens
        load.lost = tuple(filter(None, chain.from_iterable(blocks)))
        load.pieces += pieces(self._layout, record, found, blocks, tokens)
        load.lost = ()
        if record.beside:
            self._loading.bring(load.pieces)
        self.counts["loads"] += 1
        self.counts["hit_tokens"] += tokens

    def on_finished(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self.storing.pop(request_id, None)
        record = self._records.pop(request_id, None)
        if record is not None:
            self._let_lease_go(record)
            if record.unplaced_chunks:
                self.stores.give_up(record)

    def _look_up(self, record: Record, request: Request) -> None:
        self._let_lease_go(record)
        record.phase = Phase.RUNNING
        hashes = self._layout.chunk_hashes(request.block_hashes)
        if self._hybrid:  # it loads whole chunks, and one token at least is to be computed
            del hashes[(request.num_tokens - 1) // self._layout.chunk_tokens :]
        if not hashes or record.refuses_hits or request.skip_reading_prefix_cache:
            return
        if not self._gate.usable:
            self.counts["drops/lookup_gate_shut"] += 1
            return
        record.attempt += 1
        record.phase, record.hashes = Phase.LOOKING, tuple(hashes)
        record.looking_until_ms = self._clock() + self._options.lookup_deadline_ms
        record.looked_up_at = self.stores.settled
        lookup = m.Lookup(
            id=self._client.next_id(),
            session=self._gate.session,
            request=record.lease,
            hashes=b"".join(hashes[: m.CHUNKS_MAX]),
            epoch=self.stores.epochs.now,
        )
        record.arena = self._gate.arena  # after the session: the server of the next arena gives another one
        take = partial(self._take_lookup, record, record.attempt, lookup)
        self._client.send(lookup, self._options.lookup_deadline_ms, take)

    def _wait_for_lookup(self, record: Record) -> None:
        """All of a step's lookups together keep it waiting for `lookup_wait_ms` at most."""
        now_ms = self._clock()
        if not self._step_waits_until_ms:
            self._step_waits_until_ms = now_ms + self._options.lookup_wait_ms
        self._client.poll(0)
        while record.phase is Phase.LOOKING and self._gate.usable and now_ms < self._step_waits_until_ms:
            self._client.poll(self._step_waits_until_ms - now_ms)
            now_ms = self._clock()
        if record.phase is Phase.LOOKING and not self._gate.usable:
            record.phase = Phase.RUNNING  # nobody will answer
            self.counts["drops/lookup_gate_shut"] += 1
        elif record.phase is Phase.LOOKING and now_ms >= record.looking_until_ms:
            record.phase = Phase.RUNNING  # the client counts it, unless an error kept it from being sent

    def _take_lookup(self, record: Record, attempt: int, lookup: m.Lookup, reply: m.Reply | None) -> None:
        is_news = record.attempt == attempt and record.phase is Phase.LOOKING
        asked = len(lookup.hashes) // HASH_BYTES
        if not isinstance(reply, m.Found) or not fits(reply, asked, self._layout.groups):
            self.counts[f"drops/{note_failure(self._gate, lookup, reply)}"] += 1
            if reply is None:
                self._releases.append(lookup.request)  # it may have been answered, too late
            if is_news:
                record.phase = Phase.RUNNING
            return
        self._gate.succeeded()
        if not is_news or self._records.get(record.id) is not record:
            if reply.chunks:
                self._releases.append(lookup.request)  # nobody waits for it any more
            return
        self.counts["lookups/hit" if reply.chunks else "lookups/miss"] += 1
        record.stored_chunks, record.stores_end = reply.chunks, False
        record.phase = Phase.FOUND if reply.chunks else Phase.RUNNING
        if reply.chunks:
            record.found = found_of(reply, record.arena, self._clock())
            self._part_offsets = dict(enumerate(reply.part_offsets))

    def _offer(
        self, record: Record, found: Found, request: Request, local_tokens: int
    ) -> tuple[int | None, bool]:
        # One token at least is to be computed.
        tokens = min(found.chunks * self._layout.chunk_tokens, request.num_tokens - 1)
        # Less than a block is computed sooner than loaded; and after a local hit it is the last one's rest,
        # for which identical prompts would load one after the other.
        if tokens - local_tokens < self._block_tokens:
            record.local_tokens, record.beside = local_tokens, False
            return NO_HIT
        first = record.hashes[local_tokens // self._layout.chunk_tokens]
        if self._caches_locally and self._loading.brings(first):
            return ASK_AGAIN  # another request loads the same: when it has, this one hits locally
        record.local_tokens = local_tokens
        blocks = sum(-(-(tokens - local_tokens) // group.block_tokens) for group in self._layout.groups)
        patience_ms = self._options.sync_load_ms * (PATIENCE_ALONE if len(self._requests) == 1 else 1)
        record.beside = self._always_beside or self._pace.ms_of(blocks) > patience_ms
        return tokens - local_tokens, record.beside

    def _end_load(self, record: Record, lease: str, load: Load, table: Sequence[int], ok: bool) -> None:
        self._releases.append(lease)
        self._loading.brought(record.hashes)
        if record.phase is Phase.LOADING:
            record.phase = Phase.RUNNING
        if not ok:
            record.refuses_hits = True
            self.counts["drops/load_failed"] += 1
            # vLLM keeps it before those whose loads have ended.  If there is no room for it as long as these
            # have their blocks, all wait for each other; who is asked again leaves that queue to them.
            record.steps_aside = not load.at_once
            if load.at_once:  # vLLM has given them their hashes, and what follows was computed from them
                self._blocks.forget(table[table.index(load.blocks[0]) :])

    def _let_lease_go(self, record: Record) -> None:
        if record.found is not None:
            record.found = None
            self._releases.append(record.lease)

    # A step's way

    def take_loads(self) -> Plan:
        """The step's plan so far."""
        self._step_waits_until_ms = 0
        plan = self._loading.take()
        plan.part_offsets = dict(self._part_offsets)
        return plan

    def add_stores(self, plan: Plan, scheduled: Iterable[Scheduled]) -> None:
        self._client.poll(0)
        self.stores.epochs.tell(self._clock())
        stock = self.stores.stock
        stock.refill(self._clock())
        plan.part_offsets |= stock.part_offsets
        if not plan.loads:
            plan.arena = stock.arena
        storable = scheduled if plan.arena == stock.arena else ()  # else with the next step
        for request_id, tokens, tables in storable:
            record, request = self.storing.get(request_id), self._requests.get(request_id)
            if record is not None and request is not None:
                wanted = tokens if self._options.store_decode else min(tokens, request.num_prompt_tokens)
                store = self.stores.plan(record, request.block_hashes, wanted, tables)
                if store is not None:
                    plan.stores.append(store)
                if record.stores_end or (
                    wanted < tokens and not record.unplaced_chunks
                ):  # nothing comes any more
                    del self.storing[request_id]
        self._send_releases()

    def on_outcome(self, outcome: Outcome) -> None:
        """What the workers did in a step."""
        self._pace.note(outcome.loaded_blocks, outcome.load_us)
        self.jobs.take(outcome)

    def _send_releases(self) -> None:
        if self._releases and self._gate.usable:
            names, self._releases = self._releases[:RELEASES_MAX], self._releases[RELEASES_MAX:]
            release = m.Release(id=self._client.next_id(), session=self._gate.session, requests=tuple(names))
            self._client.send(release, self._options.request_deadline_ms, lambda _reply: None)

    def reset(self) -> bool:
        """The weights may have changed: what was stored is not found any more; -> is the server told?"""
        self._client.poll(0)
        told = self.stores.begin_anew()
        for record in self._records.values():
            self._let_lease_go(record)
            record.attempt += 1
            if record.phase in (Phase.LOOKING, Phase.FOUND):  # nothing of it is computed yet
                record.phase, record.stored_chunks = Phase.RUNNING, 0
            else:
                record.stores_end = True
        return told

    def close(self) -> None:
        if self._gate.usable:
            self.stores.stock.give_back()
        self._client.close()
