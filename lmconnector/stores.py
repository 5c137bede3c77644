"""Which full chunks the workers store, and the word to the server when all of them have.

vLLM's scheduler thread only.  A store outlives its request: it has a job of its own, and its blocks are held
until every worker has reported it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cache_server.protocol import messages as m
from cache_server.protocol.keys import pack_slot_names
from lmconnector.client import Client
from lmconnector.config import Options
from lmconnector.gate import Gate, note_failure
from lmconnector.geometry import ChunkLayout
from lmconnector.metadata import Outcome, Piece, Store
from lmconnector.requests import Record
from lmconnector.stock import Stock

NO_BLOCK = 0  # vLLM's null block: the group no longer needs, or never had, this one


class Blocks(Protocol):
    """vLLM's blocks, kept from reuse while a store reads them."""

    def hold(self, blocks: Sequence[int]) -> None: ...

    def let_go(self, blocks: Sequence[int]) -> None: ...


@dataclass(slots=True)
class Job:
    """A store in the workers' hands."""

    store: Store
    parent: bytes  # the hash before its first chunk
    workers_left: int
    epoch: int
    failed: bool = False

    @property
    def blocks(self) -> list[int]:
        return [block for piece in self.store.pieces for block in piece.blocks]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the scheduler's side stands on."""

    options: Options
    layout: ChunkLayout
    client: Client
    gate: Gate
    blocks: Blocks
    workers: int


class Stores:
    def __init__(self, around: Surroundings, counts: Counter[str]) -> None:
        options, layout, client, gate = around.options, around.layout, around.client, around.gate
        self.stock = Stock(client, gate, len(layout.groups), options.stock_slots, options.request_deadline_ms)
        self.epoch = 0
        self._options = options
        self._layout = layout
        self._client = client
        self._gate = gate
        self._blocks = around.blocks
        self._workers = around.workers
        self._counts = counts
        self._jobs: dict[int, Job] = {}
        self._last_job = 0

    @property
    def under_way(self) -> bool:
        return bool(self._jobs)

    def plan(
        self,
        record: Record,
        block_hashes: list[bytes],
        tokens: int,
        tables: Callable[[], Sequence[Sequence[int]]],
    ) -> Store | None:
        """The chunks that become full with the first `tokens` tokens; `tables`: the block ids per group."""
        chunks = min(tokens // self._layout.chunk_tokens, len(block_hashes) // self._layout.hashes_per_chunk)
        begin = record.stored_chunks
        if record.stores_end or chunks <= begin:
            return None
        hashes = self._layout.chunk_hashes(block_hashes)
        pieces: list[Piece] = []
        block_ids = tables() if self._gate.usable else ()
        for chunk in range(begin, chunks):
            found = self._pieces(chunk, hashes[chunk], block_ids) if block_ids else None
            if found is None:
                record.stores_end = True
                self._counts["stores_dropped"] += chunks - chunk
                break
            pieces += found
            record.stored_chunks = chunk + 1
        if not pieces:
            return None
        self._last_job += 1
        store = Store(self._last_job, pieces)
        parent = hashes[begin - 1] if begin else b""
        job = self._jobs[store.number] = Job(store, parent, self._workers, self.epoch)
        self._blocks.hold(job.blocks)
        return store

    def _pieces(self, chunk: int, hash_: bytes, tables: Sequence[Sequence[int]]) -> list[Piece] | None:
        """A slot for each group that has the chunk's blocks; None, and none is taken, without one."""
        pieces: list[Piece] = []
        for group, layout in enumerate(self._layout.groups):
            at = chunk * layout.blocks_per_chunk
            blocks = tuple(tables[group][at : at + layout.blocks_per_chunk])
            whole = len(blocks) == layout.blocks_per_chunk and NO_BLOCK not in blocks
            if not whole and layout.window:
                continue  # out of the window already: nobody will ask for it at this prefix's end
            slot = self.stock.take(group) if whole else None
            if slot is None:
                for piece in pieces:
                    self.stock.put_back(piece.group, piece.slot)
                return None
            pieces.append(Piece(group, slot, hash_, 0, blocks))
        return pieces

    def on_outcome(self, outcome: Outcome) -> None:
        if outcome.not_loaded:  # what is under way may have been computed from what was not there
            for job in self._jobs.values():
                job.failed = True
        for number, workers in outcome.stored.items():
            job = self._jobs[number]
            job.failed |= number in outcome.not_stored
            job.workers_left -= workers
            if job.workers_left <= 0:
                del self._jobs[number]
                self._blocks.let_go(job.blocks)
                self._end(job)

    def _end(self, job: Job) -> None:
        if job.failed:
            self._counts["stores_failed"] += 1
            self.stock.lost([piece.slot for piece in job.store.pieces])
            return
        for group in range(len(self._layout.groups)):
            pieces = [piece for piece in job.store.pieces if piece.group == group]
            if pieces:
                self._commit(job, group, pieces)

    def _commit(self, job: Job, group: int, pieces: list[Piece]) -> None:
        slots = [piece.slot for piece in pieces]

        def take(reply: m.Reply | None) -> None:
            if isinstance(reply, m.Committed):
                self._counts["chunks_stored"] += reply.outcomes.count(m.Outcome.STORED)
                self.stock.settled(slots)
            else:
                note_failure(self._gate, self._counts, request, reply)
                self.stock.lost(slots)

        request = m.Commit(
            id=self._client.next_id(),
            session=self._gate.session,
            group=group,
            parent=job.parent,
            hashes=b"".join(piece.hash for piece in pieces),
            slots=pack_slot_names(slots),
            epoch=job.epoch,
        )
        self._client.send(request, self._options.request_deadline_ms, take)
