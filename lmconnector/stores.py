"""Which full chunks the workers store, and the word to the server when all of them have.

vLLM's scheduler thread only.  A store outlives its request: it is a job, and its blocks are held until every
worker has ended it.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef, pack_slot_names
from lmconnector import epochs
from lmconnector.client import Client
from lmconnector.config import Options
from lmconnector.gate import Gate, note_failure
from lmconnector.geometry import ChunkLayout
from lmconnector.jobs import Jobs, Kind
from lmconnector.metadata import NO_BLOCK, Piece, Store
from lmconnector.requests import Record
from lmconnector.stock import Stock

REMEMBERED_MAX = 65_536  # stored chunks; a forgotten one may be stored twice, and the server keeps one


class Blocks(Protocol):
    """vLLM's blocks: kept from reuse while a store reads them, and forgotten where a load has failed."""

    def hold(self, blocks: Sequence[int]) -> None: ...

    def let_go(self, blocks: Sequence[int]) -> None: ...

    def forget(self, blocks: Sequence[int]) -> None:
        """No other request finds them in vLLM's own prefix cache."""
        ...


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the scheduler's side stands on."""

    options: Options
    layout: ChunkLayout
    client: Client
    gate: Gate
    blocks: Blocks
    workers: int
    caches_locally: bool  # the engine has a prefix cache of its own
    steps_overlap: bool  # the engine plans a step before it knows what became of the one before
    clock: Callable[[], int]
    draw_epoch: Callable[[], int] = epochs.draw


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive chunks of one request, stored by one job."""

    number: int
    record: Record
    arena: bytes  # in which its slots are
    parent: bytes  # the hash before its first chunk
    epoch: int
    pieces: list[Piece]

    @property
    def blocks(self) -> list[int]:
        return [block for piece in self.pieces for block in piece.blocks]


class Stores:
    def __init__(self, around: Surroundings, jobs: Jobs, counts: Counter[str]) -> None:
        options, layout, client, gate = around.options, around.layout, around.client, around.gate
        self.stock = Stock(client, gate, len(layout.groups), options.stock_slots, options.request_deadline_ms)
        self.epochs = epochs.Epochs(client, gate, counts, options.request_deadline_ms, around.draw_epoch)
        self._options = options
        self._layout = layout
        self._client = client
        self._gate = gate
        self._blocks = around.blocks
        self._clock = around.clock
        self._jobs = jobs
        self._counts = counts
        self._count = 0  # of batches begun
        self._open: dict[int, None] = {}  # those whose fate is not known yet, oldest first
        self._ours: dict[bytes, int] = {}  # chunk -> the batch that stores or stored it, oldest first

    @property
    def settled(self) -> int:
        """All batches up to this one are known to the server: a lookup sent now sees them."""
        return next(iter(self._open), self._count + 1) - 1

    def plan(
        self,
        record: Record,
        block_hashes: list[bytes],
        tokens: int,
        tables: Callable[[], Sequence[Sequence[int]]],
    ) -> Store | None:
        """The chunks that become full with the first `tokens` tokens; `tables`: the block ids per group."""
        chunks = min(tokens // self._layout.chunk_tokens, len(block_hashes) // self._layout.hashes_per_chunk)
        record.unplaced_chunks = 0
        if record.stores_end or chunks <= record.stored_chunks:
            return None
        hashes = self._layout.chunk_hashes(block_hashes)
        while record.stored_chunks < chunks and self._has_since(record, hashes[record.stored_chunks]):
            record.stored_chunks += 1  # by another request, after this one has looked it up
        begin = record.stored_chunks
        pieces = self._take_slots(record, hashes[:chunks], tables)
        if not pieces:
            return None
        self._count += 1
        parent = hashes[begin - 1] if begin else b""
        batch = Batch(self._count, record, self.stock.arena, parent, self.epochs.now, pieces)
        self._open[batch.number] = None
        self._remember(batch)
        self._blocks.hold(batch.blocks)
        return Store(self._jobs.begin(Kind.STORE, self._clock(), lambda ok: self._end(batch, ok=ok)), pieces)

    def give_up(self, record: Record, why: str = "no_slot") -> None:
        """What is not placed yet, and what follows it."""
        self._counts[f"drops/store_{why}"] += record.unplaced_chunks
        record.unplaced_chunks, record.stores_end = 0, True

    def begin_anew(self) -> bool:
        """What was stored so far is worth nothing any more; -> whether the server could be told."""
        self._ours.clear()
        return self.epochs.begin_anew(self._clock())

    def _has_since(self, record: Record, hash_: bytes) -> bool:
        return self._ours.get(hash_, 0) > record.looked_up_at

    def _remember(self, batch: Batch) -> None:
        groups = Counter(piece.hash for piece in batch.pieces)
        for hash_, count in groups.items():
            if count == len(self._layout.groups):  # else somebody may have what is missing of it
                self._ours.pop(hash_, None)
                self._ours[hash_] = batch.number
        while len(self._ours) > REMEMBERED_MAX:
            del self._ours[next(iter(self._ours))]

    def _take_slots(
        self, record: Record, hashes: list[bytes], tables: Callable[[], Sequence[Sequence[int]]]
    ) -> list[Piece]:
        """For the record's next chunks, as many as there are slots for."""
        pieces: list[Piece] = []
        block_ids = tables() if self._gate.usable else ()
        for chunk in range(record.stored_chunks, len(hashes)):
            found = self._pieces(chunk, hashes[chunk], block_ids) if block_ids else None
            if found is None:
                record.unplaced_chunks = len(hashes) - chunk
                if not self._gate.usable:
                    self.give_up(record, "gate_shut")
                elif not self.stock.is_awaited(self._clock()):
                    self.give_up(record, "no_slot")
                break
            pieces += found
            record.stored_chunks = chunk + 1
        return pieces

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

    def _end(self, batch: Batch, *, ok: bool) -> None:
        self._blocks.let_go(batch.blocks)
        session = (
            self._gate.session
        )  # before the arena is looked at: the server of the next one gives another
        if self._is_of_another_arena(batch):
            self._drop(batch, "store_arena_gone", len(batch.pieces))
        elif ok and batch.epoch == self.epochs.now:
            self._commit(batch, session)
        else:  # under an epoch that is over it would be there after the server has cleared it
            self.stock.lost([piece.slot for piece in batch.pieces])
            self._drop(batch, "store_outdated" if ok else "store_failed", len(batch.pieces))

    def _is_of_another_arena(self, batch: Batch) -> bool:
        """Then its slots' names may be those of others in the arena that is served now."""
        return batch.arena != self._gate.arena

    def _commit(self, batch: Batch, session: int) -> None:
        groups = sorted({piece.group for piece in batch.pieces})
        for group in groups:
            pieces = [piece for piece in batch.pieces if piece.group == group]
            slots = [piece.slot for piece in pieces]
            request = m.Commit(
                id=self._client.next_id(),
                session=session,
                group=group,
                parent=batch.parent,
                hashes=b"".join(piece.hash for piece in pieces),
                slots=pack_slot_names(slots),
                epoch=batch.epoch,
            )
            take = partial(self._take_commit, batch, request, slots, group == groups[-1])
            self._client.send(request, self._options.request_deadline_ms, take)

    def _take_commit(
        self, batch: Batch, request: m.Commit, slots: list[SlotRef], is_last: bool, reply: m.Reply | None
    ) -> None:
        if is_last:
            self._open.pop(batch.number, None)
        if self._is_of_another_arena(batch):
            self._drop(batch, "store_arena_gone", len(slots))
            return
        if not isinstance(reply, m.Committed):
            self.stock.lost(slots)
            self._drop(batch, note_failure(self._gate, request, reply), len(slots))
            return
        self.stock.settled(slots)
        stored, known = (reply.outcomes.count(kind) for kind in (m.Outcome.STORED, m.Outcome.EXISTS))
        self._counts["chunks_stored"] += stored
        self._counts["chunks_stored_before"] += known
        if stored + known < len(slots):
            self._drop(batch, "commit_orphan", len(slots) - stored - known)

    def _drop(self, batch: Batch, why: str, chunks: int) -> None:
        """It is a later miss; what follows it would have no parent."""
        self._counts[f"drops/{why}"] += chunks
        self._open.pop(batch.number, None)
        batch.record.stores_end = True
        for piece in batch.pieces:
            self._ours.pop(piece.hash, None)
