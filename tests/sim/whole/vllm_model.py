"""vLLM's scheduler, as far as a connector can tell (v1/core/sched/scheduler.py, async_scheduler.py).

Kept: the order of the calls into the connector, blocks and their sharing, chunked prefill, preemption,
aborts, loads before and beside the steps, what becomes of failed ones, steps that are scheduled before the
one before has ended, and the assertions that end an engine.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from sim.whole.blocks import Block, BlockTables, Pool
from sim.whole.truth import WRONG
from sim.whole.vllm_request import EngineSize, Part, Request, Results, Status, Step


class Connector(Protocol):
    def on_new_request(self, request: Request) -> None: ...
    def matched_tokens(self, request: Request, local_tokens: int) -> tuple[int | None, bool]: ...
    def on_allocated(self, request: Request, blocks: Sequence[Sequence[int]], tokens: int) -> None: ...
    def build_plan(self, step: Step) -> None: ...
    def on_finished(self, request_id: str) -> None: ...
    def on_results(self, results: Results) -> None: ...
    def has_pending_work(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Hit:
    """What is there of a prompt: in vLLM's own blocks, and behind those at the connector."""

    blocks: list[list[Block]]
    local: int = 0
    external: int = 0
    beside: bool = False


class Scheduler:
    def __init__(self, size: EngineSize, connector: Connector) -> None:
        self.size = size
        self.pool = Pool(size.blocks)
        self.tables = BlockTables(self.pool, size.block_tokens, size.windows, size.local_cache)
        self.connector = connector
        self.requests: dict[str, Request] = {}
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.waiting_with_blocks: deque[Request] = deque()
        self.done: list[Request] = []
        self._loaded: set[str] = set()
        self._failed: set[str] = set()
        self._prefills: dict[str, Request] = {}  # under way: room is kept for the rest of them
        self._finished: set[str] = set()
        self._preempted: set[str] = set()
        self._known: set[str] = set()  # to the workers, since the step before
        self._deferred: deque[tuple[int, list[Block]]] = deque()
        self._preempting = False
        self.step_number = self._sent = self._processed = 0

    # What the engine's loop asks and tells

    def has_requests(self) -> bool:
        return bool(
            self.running
            or self.waiting
            or self.waiting_with_blocks
            or self._finished
            or self.requests
            or self.connector.has_pending_work()
        )

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self.requests[request.request_id] = request
        self.connector.on_new_request(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is None or request.status is Status.FINISHED:
                continue
            self._leave_queues(request)
            delay = False
            if request.status is Status.LOADING:
                delay = request_id not in self._loaded
                self._loaded.discard(request_id)
                self._failed.discard(request_id)
            self._finish(request, delay=delay)

    def reset_prefix_cache(self) -> bool:
        """All running requests begin anew; it fails while somebody else holds a block."""
        while self.running:
            self._preempt(self.running.pop(), drop_stale=True)
        self._known.clear()
        return self.pool.reset()

    def schedule(self) -> Step:
        self.step_number += 1
        self._preempting = False  # in this very call: who was preempted before it may join
        step = Step(self.step_number)
        budget = self._schedule_running(step)
        if not self._preempting:
            self._schedule_waiting(step, budget)
        assert len(self.running) <= self.size.requests_max
        step.preempted, step.finished = self._preempted, self._finished
        self._known = set(step.parts)
        self.connector.build_plan(step)
        self._after_schedule(step)
        return step

    def update(self, step: Step, results: Results) -> None:
        if self.size.depth > 1 and step.parts:
            self._processed += 1
            while self._deferred and self._deferred[0][0] <= self._processed:
                self.pool.free_blocks(self._deferred.popleft()[1])
        self._note_failed(results.failed)
        skipped = self._note_bad_blocks(results.bad_blocks, step) if results.bad_blocks else set()
        for request_id, part in step.parts.items():
            self._deliver(request_id, part, results, skipped)
        self.connector.on_results(results)
        for request_id in results.loaded:
            assert request_id in self.requests, f"an unknown load of {request_id} is told: vLLM dies of it"
            request = self.requests[request_id]
            if request.status is Status.LOADING:
                self._loaded.add(request_id)
            else:
                assert request.status is Status.FINISHED, f"a load of {request_id} is told out of season"
                self._free(request)

    # A step

    def _schedule_running(self, step: Step) -> int:
        budget, at = self.size.step_tokens, 0
        while at < len(self.running) and budget:
            request = self.running[at]
            at += 1
            last = request.num_prompt_tokens + request.max_tokens
            if request.placeholders and request.computed + 2 - request.placeholders >= last:
                continue
            tokens = self._part(request.num_tokens + request.placeholders - request.computed, budget)
            if not tokens:
                continue
            if not self._make_room(request, tokens):
                break
            budget -= tokens
            self._enter(step, request, tokens, is_new=False)
        return budget

    def _part(self, tokens: int, budget: int) -> int:
        return min(tokens, budget, self.size.part_tokens or budget)

    def _make_room(self, request: Request, tokens: int) -> bool:
        while not self._allocate(request, tokens):
            victim = self.running[-1]
            if not self._can_be_freed(victim):
                return False
            self.running.pop()
            self._preempt(victim)
            self._preempting = True
            if victim is request:
                return False
        return True

    def _schedule_waiting(self, step: Step, budget: int) -> None:
        skipped: list[Request] = []
        while budget and (queue := self.waiting_with_blocks or self.waiting):
            if len(self.running) >= self.size.requests_max:
                break
            request = queue[0]
            if not self._is_ready(request) or (request.stale and not request.drop_stale):
                skipped.append(queue.popleft())
                continue
            hit = self._look_for(request)
            if hit is None:
                skipped.append(queue.popleft())
                continue
            if not self._admit(step, request, hit, budget):
                break
            queue.popleft()
            if request.status is Status.LOADING:
                skipped.append(request)
            else:
                budget -= step.parts[request.request_id].tokens
        for request in reversed(skipped):
            holds = request.computed > 0 or request.status is Status.LOADING
            (self.waiting_with_blocks if holds else self.waiting).appendleft(request)

    def _look_for(self, request: Request) -> Hit | None:
        """None: the connector does not know yet."""
        if request.computed:
            return Hit([[] for _ in self.size.windows])
        blocks, local = self.tables.local_hit(request.block_hashes, request.num_tokens - 1)
        matched, beside = self.connector.matched_tokens(request, local)
        if request.skip_reading_prefix_cache:
            matched, beside = 0, False
        return None if matched is None else Hit(blocks, local, matched, beside)

    def _admit(self, step: Step, request: Request, hit: Hit, budget: int) -> bool:
        computed = request.computed + hit.local + hit.external
        assert computed <= request.num_tokens, "more tokens are offered than the request has"
        tokens = 0 if hit.beside else self._part(request.num_tokens - computed, budget)
        assert hit.beside or tokens > 0, "a load before the step leaves nothing to compute: vLLM dies of it"
        assert not hit.beside or hit.external, "a load of nothing"
        if not self._allocate(request, tokens, hit, fresh=True):
            return False
        request_id = request.request_id
        self.connector.on_allocated(request, self.tables.ids(request_id), hit.external)
        request.computed = computed
        if hit.beside or computed + tokens < request.num_tokens:
            self._prefills[request_id] = request
        if hit.beside:
            request.status = Status.LOADING
            return True
        request.status = Status.RUNNING
        self.running.append(request)
        step.loads_first |= hit.external > 0
        self._enter(step, request, tokens, is_new=True)
        return True

    def _is_ready(self, request: Request) -> bool:
        if request.status is not Status.LOADING:
            return True
        request_id = request.request_id
        if request_id not in self._loaded:
            return False
        if request_id in self._failed:
            self._failed.remove(request_id)
            if request.computed:
                self.tables.hash_blocks(request_id, request.block_hashes, request.computed)
            else:
                self.pool.free_blocks(self.tables.take(request_id))
        else:
            self.tables.hash_blocks(request_id, request.block_hashes, request.computed)
        if request.computed == request.num_tokens:
            request.computed -= 1
        self._loaded.remove(request_id)
        request.status = Status.PREEMPTED if request.preemptions else Status.WAITING
        return True

    def _allocate(
        self, request: Request, tokens: int, hit: Hit | None = None, *, fresh: bool = False
    ) -> bool:
        tables, request_id = self.tables, request.request_id
        hit = hit or Hit([[] for _ in self.size.windows])
        computed = request.computed + hit.local + hit.external
        if fresh:
            whole = tables.needed(request_id, request.num_tokens, hit.blocks, computed, capped=True)
            if whole > len(self.pool.free):
                return False
        tables.drop_skipped(request_id, max(0, computed - request.in_flight))
        reserved = sum(self._remaining(other) for other in self._prefills.values()) if hit.beside else 0
        needed = tables.needed(request_id, computed + tokens, hit.blocks, computed, capped=False)
        if needed > len(self.pool.free) - reserved:
            return False
        tables.adopt(request_id, hit.blocks, hit.local, hit.external)
        tables.grow(request_id, computed + tokens)
        if not hit.beside:
            tables.hash_blocks(request_id, request.block_hashes, min(computed + tokens, request.num_tokens))
        return True

    def _remaining(self, request: Request) -> int:
        none: list[list[Block]] = [[] for _ in self.size.windows]
        return self.tables.needed(request.request_id, request.num_tokens, none, request.computed, capped=True)

    def _enter(self, step: Step, request: Request, tokens: int, *, is_new: bool) -> None:
        request_id = request.request_id
        known = not is_new and request_id in self._known
        step.parts[request_id] = Part(
            request_id,
            request.computed,
            tokens,
            request.output_count + request.placeholders,
            self.tables.ids(request_id),
            None if known else list(request.prefix.tokens),
        )

    def _after_schedule(self, step: Step) -> None:
        if self.size.depth > 1 and step.parts:
            self._sent += 1
        for request_id, part in step.parts.items():
            request = self.requests[request_id]
            request.computed += part.tokens
            request.in_flight += part.tokens
            request.last_step = self._sent
            request.is_prefill = request.computed < request.num_tokens + request.placeholders
            if not request.is_prefill:
                self._prefills.pop(request_id, None)
                if self.size.placeholders:
                    request.placeholders += 1
        self._finished, self._preempted = set(), set()

    # What becomes of it

    def _deliver(self, request_id: str, part: Part, results: Results, skipped: set[str]) -> None:
        request = self.requests.get(request_id)
        is_stale = False
        if request is not None:
            request.in_flight -= part.tokens
            if request.stale:
                is_stale = True
                request.stale -= part.tokens
                assert request.stale >= 0
        if request_id in skipped or request is None or request.status is Status.FINISHED:
            return
        if (is_stale and request.drop_stale) or request_id not in results.sampled:
            return
        was_running = request.status is Status.RUNNING
        assert results.sampled[request_id] != WRONG, f"a wrong token of {request_id} is delivered"
        request.append([results.sampled[request_id]])
        if self.size.placeholders and not is_stale:
            request.placeholders -= 1
            assert request.placeholders >= 0
        if request.output_count >= request.max_tokens:
            self._leave_queues(request)
            self._finish(request)
        elif self.size.placeholders and was_running:
            self.tables.hash_blocks(request_id, request.block_hashes, request.computed - request.placeholders)

    def _note_failed(self, failed: Iterable[str]) -> None:
        for request_id in failed:
            request = self.requests.get(request_id)
            if request is not None and request.status is Status.LOADING:
                request.computed = 0
                self._failed.add(request_id)

    def _note_bad_blocks(self, bad: set[int], step: Step) -> set[str]:
        assert len(self.size.windows) == 1, "bad blocks are told of a hybrid model: vLLM dies of it"
        loading = [one for one in self.waiting_with_blocks if one.status is Status.LOADING]
        self._failed |= self._cut_at_bad_blocks(loading, bad, step)
        return self._cut_at_bad_blocks(self.running, bad, step)

    def _cut_at_bad_blocks(self, requests: Iterable[Request], bad: set[int], step: Step) -> set[str]:
        affected: set[str] = set()
        marked: set[int] = set()
        for request in requests:
            part = step.parts.get(request.request_id)
            computed = request.computed - (part.tokens if part else 0)
            is_affected = has_marked = False
            (table,) = self.tables.ids(request.request_id)
            for at, block in enumerate(table[: -(-computed // self.size.block_tokens)]):
                if block not in bad:
                    continue
                is_affected = True
                if block in marked:
                    continue
                marked.add(block)
                if not has_marked:
                    has_marked = True
                    request.computed = at * self.size.block_tokens
            if is_affected:
                if not has_marked:
                    request.computed = computed
                affected.add(request.request_id)
        return affected

    # Requests and their blocks

    def _preempt(self, request: Request, *, drop_stale: bool = False) -> None:
        self._give_up_blocks(request)
        self._prefills.pop(request.request_id, None)
        request.status, request.computed = Status.PREEMPTED, 0
        request.drop_stale = drop_stale or (request.drop_stale and request.stale > 0)
        request.stale = request.in_flight
        request.placeholders = 0
        request.preemptions += 1
        self.waiting.appendleft(request)
        self._preempted.add(request.request_id)

    def _finish(self, request: Request, *, delay: bool = False) -> None:
        request.status = Status.FINISHED
        self._prefills.pop(request.request_id, None)
        self.tables.drop_skipped(request.request_id, max(0, request.computed - request.in_flight))
        self.connector.on_finished(request.request_id)
        self._finished.add(request.request_id)
        if not delay:
            self._free(request)

    def _free(self, request: Request) -> None:
        self._give_up_blocks(request)
        del self.requests[request.request_id]
        self.done.append(request)

    def _give_up_blocks(self, request: Request) -> None:
        blocks = self.tables.take(request.request_id)
        if self._can_be_freed(request):
            self.pool.free_blocks(blocks)
        elif blocks:
            self._deferred.append((self._sent, blocks))

    def _can_be_freed(self, request: Request) -> bool:
        return self.size.depth == 1 or request.last_step <= self._processed

    def _leave_queues(self, request: Request) -> None:
        for queue in (self.running, self.waiting, self.waiting_with_blocks):
            if request in queue:
                queue.remove(request)
