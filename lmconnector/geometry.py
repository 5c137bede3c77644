"""How tokens, vLLM's blocks and our chunks fit together.  Pure."""

from dataclasses import dataclass

from cache_server.protocol.keys import HASH_BYTES


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """One KV cache group."""

    block_tokens: int
    blocks_per_chunk: int
    window: int  # chunks needed before the end of a prefix; 0: all of them


@dataclass(frozen=True, slots=True)
class ChunkLayout:
    chunk_tokens: int
    hash_tokens: int  # tokens per block hash
    groups: tuple[GroupLayout, ...]

    @property
    def hashes_per_chunk(self) -> int:
        return self.chunk_tokens // self.hash_tokens

    def chunk_hashes(self, block_hashes: list[bytes]) -> list[bytes]:
        """A chunk goes by the hash of its last block, which chains over all before it.  Those of xxhash are
        shorter than the protocol's; the namespace tells them from others."""
        ends = range(self.hashes_per_chunk - 1, len(block_hashes), self.hashes_per_chunk)
        return [bytes(block_hashes[at]).ljust(HASH_BYTES, b"\0") for at in ends]
