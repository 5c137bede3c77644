"""The engine's workers: their KV caches, copies that take their time, and the forward pass.

A forward pass reads the KV bytes of all earlier tokens.  If they are not what the tokens make them, what it
writes is poison and what it samples is `WRONG`: that only matters if the scheduler delivers it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from cache_server.protocol.slots import Geometry, SlotState, read_entry
from lmconnector.transfer import Copy
from sim.whole.model import Model
from sim.whole.timeline import Timeline
from sim.whole.truth import CELL_BYTES, POISON, WRONG, Prefix, cell, next_token
from sim.whole.vllm_request import Part, Step


class Bytes:
    """Stands in for the tensor over the arena: it can be cut, and knows where it lies."""

    def __init__(self, file: memoryview, geometry: Geometry, begin: int = 0, end: int | None = None) -> None:
        self.file = file
        self.geometry = geometry
        self.begin = begin
        self.end = len(file) if end is None else end

    def __getitem__(self, cut: slice) -> "Bytes":
        return Bytes(
            self.file,
            self.geometry,
            min(cut.start, self.end),
            self.end if cut.stop is None else min(cut.stop, self.end),
        )

    def numel(self) -> int:
        return self.end - self.begin

    @property
    def slot_number(self) -> int:
        geometry = self.geometry
        slab, within = divmod(self.begin - geometry.data_at, geometry.slab_bytes)
        record = int.from_bytes(self.file[geometry.slab_record_at(slab) :][:8], "little")
        return slab * geometry.entries_per_slab + within // record


@dataclass
class Speed:
    """How long copies take, and how often they fail; the swarm sets it."""

    ms_max: int = 2
    failure: float = 0.0


class Ticket:
    """A copy under way: piece after piece, at random moments until it ends."""

    def __init__(self, pieces: list[Callable[[], None]], clock: Callable[[], int], *, fails: bool) -> None:
        self.pieces = pieces
        self._clock = clock
        self._began_ms = clock()
        self._fails = fails

    def done(self) -> bool:
        return not self.pieces

    def cancel(self) -> bool:
        return False  # it has begun

    def result(self) -> int:
        self.advance(len(self.pieces))
        if self._fails:
            raise OSError("a copy failed")
        return 1_000 * (self._clock() - self._began_ms)

    def advance(self, count: int) -> None:
        for _ in range(min(count, len(self.pieces))):
            self.pieces.pop()()


class SimTransfer:
    """`lmconnector.transfer`'s interface over one rank's KV cache."""

    def __init__(self, rank: "Rank") -> None:
        self._rank = rank
        self.tickets: list[Ticket] = []
        self._at_once: list[Ticket] = []

    def finish_loads(self) -> None:
        """Those that a forward pass waits for."""
        for ticket in self._at_once:
            ticket.advance(len(ticket.pieces))
        self._at_once.clear()

    def attach(self, arena: object) -> None: ...

    def close(self) -> bool:
        return True

    def load(self, copies: Sequence[Copy]) -> Ticket:
        return self._begin([one for copy in copies for one in self._load_pieces(copy)], at_once=True)

    def load_beside(self, copies: Sequence[Copy]) -> Ticket:
        return self._begin([one for copy in copies for one in self._load_pieces(copy)])

    def store(self, copies: Sequence[Copy]) -> Ticket:
        return self._begin([one for copy in copies for one in self._store_pieces(copy)])

    def clear(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._rank.write(block, 0, bytes(self._rank.page_bytes))

    def _load_pieces(self, copy: Copy) -> list[Callable[[], None]]:
        rank, page = self._rank, self._rank.page_bytes

        def read(at: int, block: int) -> None:
            begin = copy.part.begin + (copy.first + at) * page
            rank.write(block, 0, bytes(copy.part.file[begin : begin + page]))

        return [lambda at=at, block=block: read(at, block) for at, block in enumerate(copy.blocks)]

    def _store_pieces(self, copy: Copy) -> list[Callable[[], None]]:
        rank, page, part = self._rank, self._rank.page_bytes, copy.part
        number = part.slot_number
        entry = read_entry(part.file, part.geometry, number)
        assert entry is not None
        generation = entry.generation
        assert (copy.first + len(copy.blocks)) * page <= part.numel()

        def write(at: int, block: int) -> None:
            rank.check_writer(part, number, generation)
            begin = part.begin + (copy.first + at) * page
            part.file[begin : begin + page] = rank.read(block)

        return [lambda at=at, block=block: write(at, block) for at, block in enumerate(copy.blocks)]

    def _begin(self, pieces: list[Callable[[], None]], *, at_once: bool = False) -> Ticket:
        rng, speed, time = self._rank.rng, self._rank.speed, self._rank.time
        rng.shuffle(pieces)
        fails = speed.failure > 0 and rng.random() < speed.failure
        if fails:
            del pieces[: rng.randint(0, len(pieces))]
        ticket = Ticket(pieces, time.clock, fails=fails)
        if at_once and rng.random() < 0.5:
            ticket.advance(len(pieces))  # as on a CPU: done when the call returns
            return ticket
        if at_once:
            self._at_once.append(ticket)
        self.tickets = [other for other in self.tickets if not other.done()] + [ticket]
        for _ in range(len(pieces)):
            time.after(rng.randint(0, speed.ms_max), lambda: self._advance(ticket))
        return ticket

    def _advance(self, ticket: Ticket) -> None:
        if not self._rank.dead_ms or self._rank.time.now_ms < self._rank.dead_ms:
            ticket.advance(1)


class Rank:
    def __init__(
        self, number: int, model: Model, owner: bytes, time: Timeline, rng: Random, speed: Speed
    ) -> None:
        self.number = number
        self.part = number // model.replicas
        self.owner = owner
        self.page_bytes = model.page_bytes
        self.time = time
        self.rng = rng
        self.speed = speed
        self.dead_ms = 0  # from then on not even its device copies
        self._memory = bytearray(b"\xa5" * (model.size.blocks * model.page_bytes))
        self.transfer = SimTransfer(self)

    def read(self, block: int) -> bytes:
        return bytes(self._memory[block * self.page_bytes : (block + 1) * self.page_bytes])

    def write(self, block: int, at: int, content: bytes) -> None:
        assert block, "the null block is written"
        begin = block * self.page_bytes + at
        self._memory[begin : begin + len(content)] = content

    def gather(self, table: Sequence[int], begin: int, end: int) -> bytes:
        """The bytes of the tokens [begin, end)."""
        per_block = self.page_bytes // CELL_BYTES
        first = begin // per_block
        pages = b"".join([self.read(block) for block in table[first : -(-end // per_block)]])
        at = begin - first * per_block
        return pages[at * CELL_BYTES : (at + end - begin) * CELL_BYTES]

    def check_writer(self, part: Bytes, number: int, generation: int) -> None:
        entry = read_entry(part.file, part.geometry, number)
        assert entry is not None
        assert entry.generation == generation, f"slot {number} has another writer by now"
        assert entry.state == SlotState.RESERVED, f"slot {number} is written although it is not reserved"
        assert entry.owner == self.owner, f"slot {number} is another engine's"


class Runner:
    """What the workers know of the requests, and the forward pass of all of them together."""

    def __init__(
        self, ranks: Sequence[Rank], windows: Sequence[int], block_tokens: int, weights: Callable[[], int]
    ) -> None:
        self._ranks = ranks
        self._windows = windows
        self._block_tokens = block_tokens
        self._weights = weights
        self._texts: dict[str, Prefix] = {}
        self._prompts: dict[str, int] = {}

    def forward(self, step: Step) -> dict[str, int]:
        """-> what was sampled, by request"""
        for request_id in sorted(step.finished):
            self._texts.pop(request_id, None)
        return {
            request_id: token
            for request_id, part in step.parts.items()
            if (token := self._compute(part)) is not None
        }

    def _compute(self, part: Part) -> int | None:
        if part.all_tokens is not None:
            self._texts[part.request_id] = Prefix(part.all_tokens)
            self._prompts[part.request_id] = len(part.all_tokens) - part.outputs
        text = self._texts[part.request_id]
        text.cut(self._prompts[part.request_id] + part.outputs)
        end = part.computed + part.tokens
        assert end <= len(text), "a token is computed before it is known"
        right = WRONG not in text.tokens and all(
            self._reads_right(rank, text, part, group)
            for rank in self._ranks
            for group in range(len(self._windows))
        )
        for rank in self._ranks:
            for group in range(len(self._windows)):
                self._write(rank, text, part, group, right=right)
        if end < len(text):
            return None
        token = next_token(text.digests[-1], self._weights()) if right else WRONG
        text.extend([token])
        return token

    def _reads_right(self, rank: Rank, text: Prefix, part: Part, group: int) -> bool:
        window = self._windows[group]
        begin = max(0, part.computed - window + 1) if window else 0
        table = part.tables[group]
        assert all(table[begin // self._block_tokens : -(-part.computed // self._block_tokens)])
        expected = text.cells(begin, part.computed, self._weights(), group, rank.part)
        return rank.gather(table, begin, part.computed) == expected

    def _write(self, rank: Rank, text: Prefix, part: Part, group: int, *, right: bool) -> None:
        weights = self._weights()
        for at in range(part.computed, part.computed + part.tokens):
            block, within = divmod(at, self._block_tokens)
            content = cell(text.digests[at], weights, group, rank.part) if right else POISON
            rank.write(part.tables[group][block], within * CELL_BYTES, content)
