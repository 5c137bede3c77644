"""Which slots are copied into which blocks of a request.  Pure."""

from collections.abc import Iterable, Sequence

from lmconnector.geometry import ChunkLayout
from lmconnector.metadata import NO_BLOCK, Piece
from lmconnector.requests import Found, Record


def pieces(
    layout: ChunkLayout, record: Record, found: Found, blocks: Sequence[Sequence[int]], tokens: int
) -> Iterable[Piece]:
    """For `tokens` tokens behind the engine's own; `blocks` per group, a null block where none is wanted."""
    for group, shape in enumerate(layout.groups):
        first = record.local_tokens // shape.block_tokens
        end = -(-(record.local_tokens + tokens) // shape.block_tokens)
        per_chunk = shape.blocks_per_chunk
        for chunk in range(first // per_chunk, -(-end // per_chunk)):
            begin = chunk * per_chunk
            low = max(first, begin)
            ids = tuple(blocks[group][low : min(end, begin + per_chunk)])
            if NO_BLOCK in ids:  # the blocks that a window keeps are the last ones: they lie in a row
                kept = [at for at, block in enumerate(ids) if block != NO_BLOCK]
                low, ids = (low + kept[0], ids[kept[0] : kept[-1] + 1]) if kept else (low, ())
            if ids:
                yield Piece(group, found.slots[group][chunk], record.hashes[chunk], low - begin, ids)
