"""The scheduler's side: what a prompt finds in the cache, and each step's plan for the workers.

vLLM's scheduler thread only.  One record per request; when the request ends, nothing of it stays.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from cache_server.protocol import messages as m
from lmconnector.gate import note_failure
from lmconnector.metadata import Load, Outcome, Piece, Plan
from lmconnector.requests import Phase, Record, found_of
from lmconnector.stores import Stores, Surroundings

RELEASES_MAX = 1_000  # leases given back with one message


class Request(Protocol):
    """What is used of vLLM's request."""

    request_id: str
    num_tokens: int
    num_prompt_tokens: int
    block_hashes: list[bytes]


# A request, its tokens computed when the step is done, its block ids per group.
Scheduled = tuple[str, int, Callable[[], Sequence[Sequence[int]]]]


class SchedulerSide:
    def __init__(self, around: Surroundings, clock: Callable[[], int]) -> None:
        self.counts: Counter[str] = Counter()
        self.stores = Stores(around, self.counts)
        self._options = around.options
        self._layout = around.layout
        self._client = around.client
        self._gate = around.gate
        self._workers = around.workers
        self._clock = clock
        self._records: dict[str, Record] = {}
        self._requests: dict[str, Request] = {}
        self._loads: list[Load] = []
        self._releases: list[str] = []
        self._part_offsets: dict[int, tuple[int, ...]] = {}

    # A request's way

    def on_new_request(self, request: Request) -> None:
        self._requests[request.request_id] = request
        record = self._records[request.request_id] = Record(request.request_id)
        self.stores.stock.refill(self._clock())  # what this request computes can be stored in its first step
        self._look_up(record, request)

    def matched_tokens(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """How many tokens beyond the local ones can be loaded, None: ask again; and if beside the steps."""
        record = self._records.get(request.request_id)
        if record is None or record.refuses_hits:
            return 0, False
        if record.phase is Phase.LOOKING:
            self._client.poll(0 if record.waited else self._options.lookup_wait_ms)
            record.waited = True
        if record.phase is Phase.LOOKING:
            return None, False
        if record.phase is not Phase.FOUND or record.found is None:
            return 0, False
        if self._clock() >= record.found.build_until_ms:
            self._look_up(record, request)  # it has waited for long: is it still there?
            return None, False
        return self._offer(record, request, local_tokens)

    def on_preempted(self, request_id: str) -> None:
        """It will wait again, and may find more than at first."""
        record, request = self._records.get(request_id), self._requests.get(request_id)
        if record is not None and request is not None and record.phase is Phase.RUNNING:
            self._look_up(record, request)

    def _look_up(self, record: Record, request: Request) -> None:
        self._let_lease_go(record)
        hashes = self._layout.chunk_hashes(request.block_hashes)
        if not hashes or not self._gate.usable or record.refuses_hits:
            record.phase = Phase.RUNNING
            return
        record.attempt += 1
        record.phase, record.waited, record.hashes = Phase.LOOKING, False, tuple(hashes)
        attempt, lease = record.attempt, record.lease

        def take(reply: m.Reply | None) -> None:
            if self._records.get(record.id) is record and record.attempt == attempt:
                self._take_lookup(record, lookup, reply)
            elif isinstance(reply, m.Found) and reply.chunks:
                self._releases.append(lease)  # its request is gone

        lookup = m.Lookup(
            id=self._client.next_id(),
            session=self._gate.session,
            request=lease,
            hashes=b"".join(hashes[: m.CHUNKS_MAX]),
            epoch=self.stores.epoch,
        )
        self._client.send(lookup, self._options.lookup_deadline_ms, take)

    def _take_lookup(self, record: Record, lookup: m.Lookup, reply: m.Reply | None) -> None:
        record.phase = Phase.RUNNING
        if not isinstance(reply, m.Found):
            note_failure(self._gate, self.counts, lookup, reply)
            return
        self._gate.succeeded()
        self.counts["lookups"] += 1
        record.stored_chunks = max(record.stored_chunks, reply.chunks)
        if reply.chunks:
            record.phase = Phase.FOUND
            record.found = found_of(reply, self._clock())
            self._part_offsets = dict(enumerate(reply.part_offsets))

    def _offer(self, record: Record, request: Request, local_tokens: int) -> tuple[int, bool]:
        assert record.found is not None, "a hit was found"
        hybrid = len(self._layout.groups) > 1
        tokens = record.found.chunks * self._layout.chunk_tokens
        if tokens >= request.num_tokens:  # one token at least is to be computed
            tokens = request.num_tokens - 1
            if hybrid:
                tokens -= tokens % self._layout.chunk_tokens
        record.local_tokens = local_tokens
        offered = max(0, tokens - local_tokens)
        # That a load failed can be told of a hybrid model only when it ran beside the steps.
        return offered, hybrid and offered > 0

    def on_allocated(self, request: Request, blocks: Sequence[Sequence[int]], tokens: int) -> None:
        """`blocks` per group; `tokens` of ours are to be loaded into them."""
        record = self._records.get(request.request_id)
        if record is None or record.phase is not Phase.FOUND:
            return
        if not tokens:
            self._let_lease_go(record)
            record.phase = Phase.RUNNING
            return
        groups = range(len(self._layout.groups))
        load = Load(record.id, len(groups) == 1, [])
        record.phase = Phase.LOADING
        record.workers_left = self._workers
        self._loads.append(load)  # before anything can go wrong: vLLM counts on these tokens now
        load.lost = tuple(block for group in blocks for block in group if block)
        for group in groups:
            load.pieces += self._pieces(record, group, blocks[group], tokens)
        load.lost = ()
        self.counts["loads"] += 1
        self.counts["hit_tokens"] += tokens

    def _pieces(self, record: Record, group: int, blocks: Sequence[int], tokens: int) -> Iterable[Piece]:
        assert record.found is not None, "there is something to load"
        layout = self._layout.groups[group]
        first = record.local_tokens // layout.block_tokens
        end = -(-(record.local_tokens + tokens) // layout.block_tokens)
        per_chunk = layout.blocks_per_chunk
        for chunk in range(first // per_chunk, -(-end // per_chunk)):
            at = chunk * per_chunk
            wanted = [at_ for at_ in range(max(first, at), min(end, at + per_chunk)) if blocks[at_]]
            if wanted:  # the blocks that a window keeps are the last ones: they lie in a row
                slot = record.found.slots[group][chunk]
                ids = tuple(blocks[wanted[0] : wanted[-1] + 1])
                yield Piece(group, slot, record.hashes[chunk], wanted[0] - at, ids)

    def on_finished(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        record = self._records.pop(request_id, None)
        if record is not None:
            self._let_lease_go(record)

    def _let_lease_go(self, record: Record) -> None:
        if record.found is not None:
            record.found = None
            self._releases.append(record.lease)

    # A step's way

    def take_loads(self) -> Plan:
        """The step's plan so far; nothing here can fail, for vLLM counts on these loads."""
        plan = Plan(self._gate.arena, dict(self._part_offsets), self._loads)
        self._loads = []
        return plan

    def add_stores(self, plan: Plan, scheduled: Iterable[Scheduled]) -> None:
        self._client.poll(0)
        self.stores.stock.refill(self._clock())
        plan.part_offsets |= self.stores.stock.part_offsets
        for request_id, tokens, tables in scheduled:
            record, request = self._records.get(request_id), self._requests.get(request_id)
            if record is not None and request is not None:
                if not self._options.store_decode:
                    tokens = min(tokens, request.num_prompt_tokens)  # noqa: PLW2901
                store = self.stores.plan(record, request.block_hashes, tokens, tables)
                if store is not None:
                    plan.stores.append(store)
        self._send_releases()

    def on_outcome(self, outcome: Outcome) -> None:
        """What the workers did in a step."""
        for name, workers in outcome.loaded.items():
            record = self._records.get(name)
            if record is not None and record.phase is Phase.LOADING:
                self._take_load(record, workers, failed=name in outcome.not_loaded)
        self.stores.on_outcome(outcome)

    def _take_load(self, record: Record, workers: int, *, failed: bool) -> None:
        if failed and not record.refuses_hits:
            record.refuses_hits = True
            self.counts["loads_failed"] += 1
        record.workers_left -= workers
        if record.workers_left <= 0:
            record.phase = Phase.RUNNING
            self._let_lease_go(record)

    def _send_releases(self) -> None:
        if self._releases and self._gate.usable:
            names, self._releases = self._releases[:RELEASES_MAX], self._releases[RELEASES_MAX:]
            release = m.Release(id=self._client.next_id(), session=self._gate.session, requests=tuple(names))
            self._client.send(release, self._options.request_deadline_ms, lambda _reply: None)

    def reset(self) -> None:
        """The weights may have changed: what was stored is no longer found, by us."""
        self._client.poll(0)
        clear = m.Clear(id=self._client.next_id(), session=self._gate.session, epoch=self.stores.epoch)
        self._client.send(clear, self._options.request_deadline_ms, lambda _reply: None)
        self.stores.epoch += 1

    def close(self) -> None:
        if self._gate.usable:
            self.stores.stock.give_back()
        self._client.close()
