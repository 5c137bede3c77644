"""Hit rates of the eviction policies on a recorded trace: `python -m bench.eviction_trace --trace FILE`.

A line of the trace is one request, {"hash_ids": [..], ..}: the ids of its prompt's blocks in order; equal ids
are equal blocks after equal prefixes.  A block counts as a hit if it and all before it are stored.
Beside the policies, which run in the server's own index, stand caches of single blocks that know no prefixes,
and the optimum, which knows the future.
"""

import argparse
import heapq
import json
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from cache_server.eviction import POLICIES, Lru, Policy, Ranked
from cache_server.index import Chunk, Index
from cache_server.protocol.keys import HASH_BYTES, NO_PARENT, SlotRef

PERCENT_OF_BLOCKS = (1, 2, 5, 10, 20, 50)
SEED = 1
NEW_BLOCKS = 1 << 60  # ids from here on are in no trace
SLOT_BYTES = 1
NO_SLOT = SlotRef(0, 0, 0)

Block = bytes
Prompt = Sequence[Block]


# --- policies that were tried


class SegmentedLru(Lru):
    """What was used once is protected: it leaves only when nothing unused is left."""

    def rank(self, chunk: Ranked) -> int:
        return chunk.stamp + (chunk.hits > 0) * NEW_BLOCKS


class TwoQueues(Lru):
    """2Q: what comes back after its eviction is protected."""

    def __init__(self) -> None:
        self._left: set[Block] = set()

    def rank(self, chunk: Ranked) -> int:
        return chunk.stamp + (chunk.hash in self._left) * NEW_BLOCKS

    def evicted(self, chunk: Ranked) -> None:
        self._left.add(chunk.hash)


class AgedLfu(Lru):
    """LFU-DA: a use counts one, being stored too, on top of the count with which the last chunk left."""

    def __init__(self) -> None:
        self._age = 0
        self._counts: dict[Block, int] = {}

    def rank(self, chunk: Ranked) -> int:
        self._counts[chunk.hash] = count = self._age + chunk.hits + 1
        return (count << 40) + chunk.stamp

    def evicted(self, chunk: Ranked) -> None:
        self._age = max(self._age, self._counts.pop(chunk.hash))


TRIED: dict[str, Callable[[], Policy]] = {"slru": SegmentedLru, "2q": TwoQueues, "lfu-da": AgedLfu}


# --- caches of single blocks


class Flat(Protocol):
    def __init__(self, capacity: int) -> None: ...

    def __contains__(self, block: Block) -> bool: ...

    def touch(self, block: Block) -> None:
        """Uses or stores it."""
        ...


class FlatLru:
    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[Block, None] = OrderedDict()

    def __contains__(self, block: Block) -> bool:
        return block in self._blocks

    def touch(self, block: Block) -> None:
        if block not in self._blocks and len(self._blocks) == self._capacity:
            self._blocks.popitem(last=False)
        self._blocks[block] = None
        self._blocks.move_to_end(block)


class Sieve:
    """A hand walks from old to new and takes the first block not visited since it last came by."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._visited: dict[Block, bool] = {}
        self._passed: deque[Block] = deque()
        self._ahead: deque[Block] = deque()

    def __contains__(self, block: Block) -> bool:
        return block in self._visited

    def touch(self, block: Block) -> None:
        if block in self._visited:
            self._visited[block] = True
            return
        if len(self._visited) == self._capacity:
            self._evict()
        self._visited[block] = False
        self._ahead.append(block)

    def _evict(self) -> None:
        while True:
            if not self._ahead:
                self._ahead, self._passed = self._passed, self._ahead
            block = self._ahead.popleft()
            if not self._visited[block]:
                del self._visited[block]
                return
            self._visited[block] = False
            self._passed.append(block)


class S3Fifo:
    """A small queue in front of the main one, and ghosts of what left the small one."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._uses: dict[Block, int] = {}
        self._small: deque[Block] = deque()
        self._main: deque[Block] = deque()
        self._ghosts: OrderedDict[Block, None] = OrderedDict()

    def __contains__(self, block: Block) -> bool:
        return block in self._uses

    def touch(self, block: Block) -> None:
        if block in self._uses:
            self._uses[block] = min(3, self._uses[block] + 1)
            return
        while len(self._uses) >= self._capacity:
            if 10 * len(self._small) >= self._capacity or not self._main:
                self._leave_small()
            else:
                self._leave_main()
        (self._main if block in self._ghosts else self._small).append(block)
        self._ghosts.pop(block, None)
        self._uses[block] = 0

    def _leave_small(self) -> None:
        block = self._small.popleft()
        if self._uses[block] > 1:
            self._uses[block] = 0
            self._main.append(block)
            return
        del self._uses[block]
        self._ghosts[block] = None
        if len(self._ghosts) > self._capacity:
            self._ghosts.popitem(last=False)

    def _leave_main(self) -> None:
        block = self._main.popleft()
        if self._uses[block]:
            self._uses[block] -= 1
            self._main.append(block)
        else:
            del self._uses[block]


class Arc:
    """Two LRU lists, of blocks used once and more often; hits on their ghosts move the border."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._border = 0
        self._once: OrderedDict[Block, None] = OrderedDict()
        self._often: OrderedDict[Block, None] = OrderedDict()
        self._once_ghosts: OrderedDict[Block, None] = OrderedDict()
        self._often_ghosts: OrderedDict[Block, None] = OrderedDict()

    def __contains__(self, block: Block) -> bool:
        return block in self._once or block in self._often

    def touch(self, block: Block) -> None:
        if block in self:
            self._once.pop(block, None)
        elif block in self._once_ghosts:
            step = max(1, len(self._often_ghosts) // len(self._once_ghosts))
            self._border = min(self._capacity, self._border + step)
            self._evict(len(self._once) > self._border)
            del self._once_ghosts[block]
        elif block in self._often_ghosts:
            step = max(1, len(self._once_ghosts) // len(self._often_ghosts))
            self._border = max(0, self._border - step)
            self._evict(len(self._once) >= self._border)
            del self._often_ghosts[block]
        else:
            self._store(block)
            return
        self._often[block] = None
        self._often.move_to_end(block)

    def _store(self, block: Block) -> None:
        if len(self._once) == self._capacity:
            self._once.popitem(last=False)
        else:
            if len(self._once) + len(self._once_ghosts) == self._capacity:
                self._once_ghosts.popitem(last=False)
            elif len(self._once_ghosts) + len(self._often_ghosts) >= self._capacity:
                self._often_ghosts.popitem(last=False)
            if len(self._once) + len(self._often) == self._capacity:
                self._evict(len(self._once) > self._border)
        self._once[block] = None

    def _evict(self, of_once: bool) -> None:
        if (of_once or not self._often) and self._once:
            self._once_ghosts[self._once.popitem(last=False)[0]] = None
        else:
            self._often_ghosts[self._often.popitem(last=False)[0]] = None


FLAT: dict[str, type[Flat]] = {
    "flat lru": FlatLru,
    "flat s3-fifo": S3Fifo,
    "flat sieve": Sieve,
    "flat arc": Arc,
}


# --- replays: each returns how many blocks were found


def replay(prompts: Sequence[Prompt], new_policy: Callable[[], Policy], capacity: int) -> int:
    """Each request finds its prefix, loads it under a lease, and stores the rest behind it."""
    index = Index(new_policy)
    space = index.space(b"trace", 0, SLOT_BYTES, 0)
    hits = 0
    for prompt in prompts:
        found = index.longest_prefix([space], prompt)
        hits += found
        last: Chunk | None = None
        if found:
            (last,) = index.use(space, prompt, found).ends
            index.lease(last)
        kept = prompt[found:capacity]
        excess = len(index) + len(kept) - capacity
        if excess > 0:
            assert index.evict(SLOT_BYTES, excess) is not None, "only the prefix is leased"
        parent = last.hash if last else NO_PARENT
        for block in kept:
            index.admit(space, block, parent, NO_SLOT)
            parent = block
        if last:
            index.unlease(last)
        assert len(index) <= capacity
    return hits


def replay_flat(prompts: Sequence[Prompt], new_cache: Callable[[int], Flat], capacity: int) -> int:
    cache = new_cache(capacity)
    hits = 0
    for prompt in prompts:
        hits += next((found for found, block in enumerate(prompt) if block not in cache), len(prompt))
        for block in prompt:
            cache.touch(block)
    return hits


def replay_optimum(prompts: Sequence[Prompt], capacity: int) -> int:
    """Belady's MIN; may also not store a block.  A prefix is needed again no later than what is behind it, so
    as ties are decided for the parent, MIN keeps the prefix rule by itself."""
    never = len(prompts)
    next_use: dict[Block, int] = {}
    next_uses: list[list[int]] = []
    for at in range(len(prompts) - 1, -1, -1):
        next_uses.append([next_use.get(block, never) for block in prompts[at]])
        next_use.update(dict.fromkeys(prompts[at], at))
    stored: dict[Block, int] = {}
    latest_first: list[tuple[int, int, Block]] = []
    hits = 0
    for prompt, uses in zip(prompts, reversed(next_uses), strict=True):
        hits += next((found for found, block in enumerate(prompt) if block not in stored), len(prompt))
        for depth, (block, use) in enumerate(zip(prompt, uses, strict=True)):
            stored[block] = use
            heapq.heappush(latest_first, (-use, -depth, block))
        while len(stored) > capacity:
            use, _, block = heapq.heappop(latest_first)
            if stored.get(block) == -use:
                del stored[block]
    return hits


# --- workloads


def load(path: Path) -> list[Prompt]:
    with path.open() as lines:
        return [to_blocks(json.loads(line)["hash_ids"]) for line in lines if line.strip()]


def to_blocks(ids: Sequence[int]) -> Prompt:
    return [number.to_bytes(HASH_BYTES, "big") for number in ids]


def one_shots_between(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Three of ten requests are prompts as long as the others that nobody asks for again."""
    dice = random.Random(SEED)
    mixed: list[Prompt] = []
    unused = NEW_BLOCKS
    for prompt in prompts:
        mixed.append(prompt)
        while dice.random() < 0.3:
            length = len(dice.choice(prompts))
            mixed.append(to_blocks(range(unused, unused + length)))
            unused += length
    return mixed


def shared_documents(prompts: Sequence[Prompt]) -> list[Prompt]:
    """As many questions about 3,000 documents; their popularity follows Zipf's law and never changes."""
    dice = random.Random(SEED)
    documents = [range(100 * number, 100 * number + dice.randint(8, 60)) for number in range(3000)]
    weights = [(rank + 1) ** -0.8 for rank in range(len(documents))]
    asked = dice.choices(documents, weights, k=len(prompts))
    return [to_blocks([*document, NEW_BLOCKS + at]) for at, document in enumerate(asked)]


WORKLOADS: dict[str, Callable[[Sequence[Prompt]], Sequence[Prompt]]] = {
    "trace": lambda prompts: prompts,
    "every second request": lambda prompts: prompts[::2],
    "30% one-shot requests": one_shots_between,
    "shared documents": shared_documents,
}


def measure(name: str, prompts: Sequence[Prompt]) -> dict:
    requested = sum(map(len, prompts))
    distinct = len({block for prompt in prompts for block in prompt})
    capacities = [max(1, distinct * percent // 100) for percent in PERCENT_OF_BLOCKS]
    rates: dict[str, list[float]] = {}

    def run(row: str, hits_at: Callable[[int], int]) -> None:
        rates[row] = [round(100 * hits_at(capacity) / requested, 2) for capacity in capacities]
        print(f"{row:22}", *(f"{rate:7.2f}" for rate in rates[row]), file=sys.stderr, flush=True)

    print(f"\n{name}: {len(prompts)} requests, {requested} blocks, {distinct} distinct", file=sys.stderr)
    print(f"{'capacity in blocks':22}", *(f"{capacity:7}" for capacity in capacities), file=sys.stderr)
    for row, new_policy in (POLICIES | TRIED).items():
        run(row, lambda capacity, new_policy=new_policy: replay(prompts, new_policy, capacity))
    for row, new_cache in FLAT.items():
        run(row, lambda capacity, new_cache=new_cache: replay_flat(prompts, new_cache, capacity))
    run("optimum", lambda capacity: replay_optimum(prompts, capacity))
    return {
        "requests": len(prompts),
        "requested_blocks": requested,
        "distinct_blocks": distinct,
        "capacities_percent": PERCENT_OF_BLOCKS,
        "capacities_blocks": capacities,
        "hit_rates_percent": rates,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.eviction_trace", description=__doc__)
    parser.add_argument("--trace", type=Path, required=True, help="JSON lines with hash_ids")
    parser.add_argument("--out", type=Path, help="where the figures go, as JSON; default: stdout")
    parser.add_argument("--requests", type=int, help="only the first so many: a test of the bench")
    options = parser.parse_args()
    prompts = load(options.trace)[: options.requests]
    figures = {
        "trace": options.trace.name,
        "seed": SEED,
        "workloads": {name: measure(name, make(prompts)) for name, make in WORKLOADS.items()},
    }
    text = json.dumps(figures, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main()
