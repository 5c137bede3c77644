"""The engine's two sides joined in memory with a real service, and an arena in a file that both map."""

import itertools
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cache_server.protocol import messages as m
from cache_server.protocol.slots import FORMAT_VERSION
from kit import ARENA_ID, KIB, Peer, World, chain
from lmconnector.arena import ArenaMap
from lmconnector.client import Client
from lmconnector.config import Options
from lmconnector.geometry import ChunkLayout, GroupLayout
from lmconnector.link import Event
from lmconnector.metadata import Outcome, Plan
from lmconnector.pace import Pace
from lmconnector.scheduler import SchedulerSide
from lmconnector.stores import Surroundings
from lmconnector.transfer import new_transfer
from lmconnector.worker import Part, WorkerSide

BLOCK_TOKENS = 16
CHUNK_TOKENS = 32
PAGE_BYTES = 2 * KIB
BLOCKS = 64
LAYOUT = ChunkLayout(CHUNK_TOKENS, BLOCK_TOKENS, (GroupLayout(BLOCK_TOKENS, 2, 0),))


class FileWorld(World):
    """Its arena lies in a file, for others to map."""

    def __init__(self, path: Path, **options) -> None:
        super().__init__(**options)
        path.write_bytes(self.file)
        with path.open("r+b") as file:
            self.file = memoryview(mmap.mmap(file.fileno(), 0))
        self.path = path
        self.service = self.start()

    def map(self) -> ArenaMap:
        size = self.geometry.file_bytes
        return ArenaMap.open(
            m.Arena(str(self.path), ARENA_ID, FORMAT_VERSION, size, self.geometry.capacity_bytes)
        )


class MemoryLink:
    """Asks the service at once; the replies wait for the next poll, or for ever."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked: list[m.Request] = []
        self.waiting: list[Event] = []
        self.polls: list[int] = []
        self.answers = True  # else the server is hung

    def send(self, request: m.Request) -> bool:
        self.asked.append(request)
        if self.answers:
            self.waiting.append(self.world.service.handle(request, self.world.now_ms))
        return True

    def poll(self, timeout_ms: int) -> list[Event]:
        self.polls.append(timeout_ms)
        events, self.waiting = self.waiting, []
        if not events:
            self.world.now_ms += timeout_ms
        return events

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def kinds(self) -> list[str]:
        return [type(request).__name__ for request in self.asked]


class OpenGate:
    def __init__(self, session: int) -> None:
        self.usable = True
        self.session = session
        self.arena = ARENA_ID
        self.heard: list[str] = []

    def disappointed(self) -> None:
        self.heard.append("disappointed")

    def succeeded(self) -> None: ...

    def forgotten(self, session: int) -> None:
        self.heard.append(f"forgotten {session}")


class CountedBlocks:
    def __init__(self) -> None:
        self.held: list[int] = []
        self.forgotten: list[int] = []

    def hold(self, blocks: Sequence[int]) -> None:
        self.held += blocks

    def let_go(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.held.remove(block)

    def forget(self, blocks: Sequence[int]) -> None:
        self.forgotten += blocks


@dataclass
class Prompt:
    """A request as vLLM's scheduler has it."""

    request_id: str
    num_tokens: int
    name: str = "chain"
    skip_reading_prefix_cache: bool = False
    blocks: list[int] = field(default_factory=list)
    answered: int = 0  # tokens of `num_tokens` that the engine has generated

    @property
    def num_prompt_tokens(self) -> int:
        return self.num_tokens - self.answered

    @property
    def block_hashes(self) -> list[bytes]:
        return chain(self.num_tokens // BLOCK_TOKENS, self.name)


class Engine:
    """One worker and its scheduler, and the KV cache between them."""

    def __init__(self, path: Path, **options) -> None:
        self.world = FileWorld(path, capacity_bytes=512 * KIB, slab_bytes=64 * KIB)
        groups = [m.Group(group.blocks_per_chunk * PAGE_BYTES, group.window) for group in LAYOUT.groups]
        self.peer = Peer(self.world, groups=groups).start()
        self.link = MemoryLink(self.world)
        self.gate = OpenGate(self.peer.sessions[0])
        self.blocks = CountedBlocks()
        self.cache = torch.randint(1, 255, (BLOCKS, PAGE_BYTES), dtype=torch.uint8)
        self.arena = self.world.map()
        around = Surroundings(
            Options(**{"chunk_tokens": CHUNK_TOKENS, "stock_slots": 8, **options}),
            LAYOUT, Client(self.link, self.clock), self.gate, self.blocks,
            workers=1, caches_locally=True, steps_overlap=False, clock=self.clock,
        )  # fmt: skip
        self.pace = Pace(PAGE_BYTES)
        self.scheduler = SchedulerSide(around, self.pace)
        part = Part(0, tuple(group.part_bytes for group in groups), PAGE_BYTES, stores=True)
        self.worker = WorkerSide(new_transfer([self.cache], LAYOUT.groups), part, lambda: self.arena)
        self.free = itertools.count(1)

    def clock(self) -> int:
        return self.world.now_ms

    def prompt(self, name: str, tokens: int, chain_name: str = "chain") -> Prompt:
        blocks = [next(self.free) for _ in range(-(-tokens // BLOCK_TOKENS))]
        return Prompt(name, tokens, chain_name, blocks=blocks)

    def plan(self, *computing: Prompt) -> Plan:
        """A step in which these prompts are computed to their end."""
        plan = self.scheduler.take_loads()
        scheduled = [
            (prompt.request_id, prompt.num_tokens, lambda p=prompt: [p.blocks]) for prompt in computing
        ]
        self.scheduler.add_stores(plan, scheduled)
        return plan

    def work(self, plan: Plan) -> tuple[set[str], set[str], set[int], Outcome]:
        """The worker's hooks in vLLM's order -> loads ended beside, failed ones, bad blocks, outcome."""
        self.worker.load(plan)
        self.worker.store(plan)
        ended, failed = self.worker.take_finished_loads()
        return ended, failed, self.worker.take_bad_blocks(), self.worker.take_outcome()

    def step(self, *computing: Prompt) -> tuple[set[str], set[str], set[int]]:
        ended, failed, bad, outcome = self.work(self.plan(*computing))
        self.scheduler.on_outcome(outcome)
        self.scheduler._client.poll(0)
        return ended, failed, bad

    def run(self, prompt: Prompt) -> None:
        """From its arrival to its end, without a hit."""
        self.scheduler.on_new_request(prompt)
        self.scheduler._client.poll(0)
        assert self.scheduler.matched_tokens(prompt, 0) == (0, False)
        self.scheduler.on_allocated(prompt, [prompt.blocks], 0)
        self.step(prompt)
        self.scheduler.on_finished(prompt.request_id)
        self.step()

    def leases(self) -> int:
        return len(self.world.service.leases)
