"""What an engine runs: its parallelism, its cache groups, and how they lie in chunks."""

from dataclasses import dataclass

from cache_server.protocol import messages as m
from cache_server.protocol.keys import key_prefix
from lmconnector.geometry import ChunkLayout, GroupLayout
from sim.whole.truth import CELL_BYTES
from sim.whole.vllm_request import EngineSize


@dataclass(frozen=True)
class Model:
    """What all engines of a world run."""

    namespace: bytes
    weights: int
    ranks: int
    replicas: int  # ranks that hold the same bytes
    blocks_per_chunk: int
    size: EngineSize

    @property
    def parts(self) -> int:
        return self.ranks // self.replicas

    @property
    def page_bytes(self) -> int:
        return self.size.block_tokens * CELL_BYTES

    @property
    def chunk_tokens(self) -> int:
        return self.blocks_per_chunk * self.size.block_tokens

    @property
    def part_bytes(self) -> int:
        return self.blocks_per_chunk * self.page_bytes

    def prefix(self, epoch: int) -> bytes:
        """What the server puts before its keys."""
        geometry = [(group.window, *[self.part_bytes] * self.parts) for group in self.layout.groups]
        return key_prefix(self.namespace, epoch, geometry)

    @property
    def stores_whole_chunks(self) -> bool:
        """Else some blocks of a chunk have left the window before it is full, and a prompt of few chunks is
        not found again."""
        shortest = min((window for window in self.size.windows if window), default=0)
        step_tokens = min(self.size.step_tokens, self.size.part_tokens or self.size.step_tokens)
        return step_tokens > self.chunk_tokens or not shortest or shortest >= self.chunk_tokens

    @property
    def layout(self) -> ChunkLayout:
        tokens, per_chunk = self.size.block_tokens, self.blocks_per_chunk
        groups = []
        for window in self.size.windows:
            blocks = -(-(window - 1) // tokens) if window else 0
            chunks = max(1, -(-blocks // per_chunk)) if window else 0
            groups.append(GroupLayout(tokens, per_chunk, chunks))
        return ChunkLayout(self.chunk_tokens, tokens, tuple(groups))

    def wire_layout(self, rank: int) -> m.Layout:
        groups = tuple(m.Group(self.part_bytes, group.window) for group in self.layout.groups)
        return m.Layout(groups=groups, part=rank // self.replicas, parts=self.parts)
