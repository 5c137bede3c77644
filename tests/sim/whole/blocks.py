"""vLLM's block pool and prefix cache, as far as a connector can tell (block_pool.py, kv_cache_manager.py).

All groups have the same block size; the first attends to everything, a second one through a window.
"""

from collections import Counter, OrderedDict
from collections.abc import Sequence


def ceil_div(value: int, unit: int) -> int:
    return -(-value // unit)


class Block:
    __slots__ = ("id", "key", "refs")

    def __init__(self, number: int) -> None:
        self.id = number
        self.refs = 0
        self.key: tuple[bytes, int] | None = None


class Pool:
    def __init__(self, count: int) -> None:
        self.blocks = [Block(number) for number in range(count)]
        self.null = self.blocks[0]
        self.free: OrderedDict[int, None] = OrderedDict((number, None) for number in range(1, count))
        self.held: Counter[int] = Counter()  # by the connector
        self._cached: dict[tuple[bytes, int], dict[int, Block]] = {}

    def cached(self, hash_: bytes, group: int) -> Block | None:
        blocks = self._cached.get((hash_, group))
        return next(iter(blocks.values())) if blocks else None

    def get_new(self, count: int) -> list[Block]:
        assert count <= len(self.free), "vLLM asks for more blocks than are free"
        blocks = [self.blocks[self.free.popitem(last=False)[0]] for _ in range(count)]
        for block in blocks:
            self._uncache(block)
            assert block.refs == 0
            block.refs = 1
        return blocks

    def touch(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            if block.refs == 0 and block is not self.null:
                del self.free[block.id]
            block.refs += 1

    def free_blocks(self, blocks: Sequence[Block]) -> None:
        first, last = [], []
        for block in blocks:
            block.refs -= 1
            if block is self.null:
                continue
            assert block.refs >= 0, f"block {block.id} was freed more often than it was taken"
            if block.refs == 0:
                (first if block.key is None else last).append(block)
        for block in reversed(first):
            self.free[block.id] = None
            self.free.move_to_end(block.id, last=False)
        for block in last:
            self.free[block.id] = None

    def cache(self, block: Block, hash_: bytes, group: int) -> None:
        assert block.key is None, "vLLM hashes a block once"
        block.key = (hash_, group)
        self._cached.setdefault(block.key, {})[block.id] = block

    def reset(self) -> bool:
        """Forgets all hashes, if nobody uses a block."""
        if len(self.free) < len(self.blocks) - 1:
            return False
        for block in self.blocks:
            self._uncache(block)
        return True

    def _uncache(self, block: Block) -> None:
        if block.key is not None:
            del self._cached[block.key][block.id]
            if not self._cached[block.key]:
                del self._cached[block.key]
            block.key = None

    # For the connector: its holds, told apart from vLLM's own.

    def hold(self, blocks: Sequence[int]) -> None:
        assert 0 not in blocks, "the null block is held"
        self.touch([self.blocks[number] for number in blocks])
        self.held.update(blocks)

    def let_go(self, blocks: Sequence[int]) -> None:
        for number in blocks:
            self.held[number] -= 1
            assert self.held[number] >= 0, f"block {number} is let go more often than it was held"
            if not self.held[number]:
                del self.held[number]
        self.free_blocks([self.blocks[number] for number in blocks])

    def forget(self, blocks: Sequence[int]) -> None:
        for number in blocks:
            self._uncache(self.blocks[number])


class BlockTables:
    """Which blocks each request has, per group, and which of them are in the prefix cache."""

    def __init__(self, pool: Pool, block_tokens: int, windows: Sequence[int], caches: bool) -> None:
        """`windows`: in tokens, per group; 0: attends to everything."""
        self.pool = pool
        self.block_tokens = block_tokens
        self.windows = tuple(windows)
        self._caches = caches
        self.of: dict[str, list[list[Block]]] = {}
        self._hashed: dict[str, list[int]] = {}

    def ids(self, request_id: str) -> tuple[tuple[int, ...], ...]:
        tables = self.of.get(request_id)
        if tables is None:
            return tuple(() for _ in self.windows)
        return tuple(tuple([block.id for block in table]) for table in tables)

    def local_hit(self, hashes: Sequence[bytes], tokens_max: int) -> tuple[list[list[Block]], int]:
        found: list[list[Block]] = [[] for _ in self.windows]
        for at in range(tokens_max // self.block_tokens if self._caches else 0):
            block = self.pool.cached(hashes[at], 0)
            if block is None:
                break
            found[0].append(block)
        for group, window in enumerate(self.windows):
            if window:
                found[group] = self._window_hit(hashes, len(found[0]), group, window)
                found[0] = found[0][: len(found[group])]
        return found, len(found[0]) * self.block_tokens

    def _window_hit(self, hashes: Sequence[bytes], length: int, group: int, window: int) -> list[Block]:
        needed = ceil_div(window - 1, self.block_tokens)
        table = [self.pool.null] * length
        run = 0
        for at in range(length - 1, -1, -1):
            block = self.pool.cached(hashes[at], group)
            if block is None:
                run = 0
                continue
            table[at] = block
            run += 1
            if run >= needed:
                return table[: at + run]
        return table[:run]

    def _skipped(self, group: int, computed: int) -> int:
        """Whole blocks that nobody attends to any more."""
        window = self.windows[group]
        return max(0, computed - window + 1) // self.block_tokens if window else 0

    def needed(
        self, request_id: str, tokens: int, hit: Sequence[Sequence[Block]], computed: int, *, capped: bool
    ) -> int:
        """New blocks, those of the hit that would be taken from the free ones included."""
        total = 0
        for group, window in enumerate(self.windows):
            required = ceil_div(tokens, self.block_tokens)
            if capped and window:
                required = min(required, ceil_div(window - 1 + tokens, self.block_tokens) + 1)
            own = len(self.of[request_id][group]) if request_id in self.of else 0
            if request_id in self._hashed:
                total += max(required - own, 0)
                continue
            skipped = self._skipped(group, computed)
            total += max(required - max(skipped, len(hit[group]) + own), 0)
            total += sum(
                block.refs == 0 and block is not self.pool.null
                for block in hit[group][max(0, skipped - own) :]
            )
        return total

    def drop_skipped(self, request_id: str, processed: int) -> None:
        tables = self.of.get(request_id)
        if tables is None:
            return
        for group, table in enumerate(tables):
            dropped = []
            for at in range(min(self._skipped(group, processed), len(table)) - 1, -1, -1):
                if table[at] is self.pool.null:
                    break
                dropped.append(table[at])
                table[at] = self.pool.null
            self.pool.free_blocks(dropped)

    def adopt(self, request_id: str, hit: Sequence[Sequence[Block]], local: int, external: int) -> None:
        """A local hit, and room for what is loaded behind it."""
        if request_id in self._hashed:
            assert not any(hit)
            assert not external
            return
        tables = self.of.setdefault(request_id, [[] for _ in self.windows])
        self._hashed[request_id] = []
        for group, table in enumerate(tables):
            assert not table
            skipped = self._skipped(group, local + external)
            kept = list(hit[group][skipped:])
            self.pool.touch(kept)
            table.extend([self.pool.null] * skipped + kept)
            self._hashed[request_id].append(len(table))
        if external:
            for table in tables:
                missing = ceil_div(local + external, self.block_tokens) - len(table)
                table.extend(self.pool.get_new(max(0, missing)))

    def grow(self, request_id: str, tokens: int) -> None:
        for table in self.of[request_id]:
            table.extend(self.pool.get_new(max(0, ceil_div(tokens, self.block_tokens) - len(table))))

    def hash_blocks(self, request_id: str, hashes: Sequence[bytes], tokens: int) -> None:
        """Those that are full with the first `tokens` tokens are found from now on."""
        for group, table in enumerate(self.of[request_id]):
            full = tokens // self.block_tokens
            for at in range(self._hashed[request_id][group], full):
                if table[at] is not self.pool.null and self._caches:
                    self.pool.cache(table[at], hashes[at], group)
            self._hashed[request_id][group] = max(full, self._hashed[request_id][group])

    def take(self, request_id: str) -> list[Block]:
        """The request gives up its blocks; in the order in which they are to be freed."""
        self._hashed.pop(request_id, None)
        tables = self.of.pop(request_id, [])
        return [block for table in tables for block in reversed(table)]
