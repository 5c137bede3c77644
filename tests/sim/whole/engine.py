"""One engine: its scheduler's loop, its workers' steps, and the real connector's two sides between them.

The connector's hooks are called as vLLM and `lmconnector.connector` call them, in that order; an exception in
one of them is not caught here, for it is a bug.
"""

from collections import deque
from collections.abc import Sequence
from random import Random

import msgspec

from cache_server.protocol import messages as m
from cache_server.protocol.keys import owner_of
from lmconnector.client import Client, OnReply
from lmconnector.config import Options
from lmconnector.health import Timing
from lmconnector.membership import registration
from lmconnector.metadata import Outcome
from lmconnector.pace import Pace
from lmconnector.scheduler import SchedulerSide
from lmconnector.stores import Surroundings
from lmconnector.worker import Part, WorkerSide
from sim.whole.cache_process import CacheProcess
from sim.whole.member import SimMember
from sim.whole.model import Model
from sim.whole.network import Network, SimLink
from sim.whole.process import Process
from sim.whole.ranks import Rank, Runner, Speed
from sim.whole.steps import Aggregator, StepRun
from sim.whole.vllm_model import Scheduler
from sim.whole.vllm_request import Request, Results, Step

PENDING_MS_MAX = 10_000  # as in lmconnector.connector


class WatchedClient(Client):
    def __init__(self, engine: "Engine") -> None:
        super().__init__(engine.link, engine.process.clock)
        self._engine = engine

    def send(self, request: m.Request, deadline_ms: int, on_reply: OnReply) -> None:
        self._engine.checks.on_sent(self._engine, request)
        super().send(request, deadline_ms, on_reply)


class Connector:
    """What lies between vLLM's hooks and the two sides; see `lmconnector.connector`."""

    def __init__(self, engine: "Engine", side: SchedulerSide) -> None:
        self.side = side
        self._engine = engine

    def on_new_request(self, request: Request) -> None:
        self.side.on_new_request(request)

    def matched_tokens(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        begun_ms = self._engine.checks._now_ms
        tokens, beside = self.side.matched_tokens(request, local_tokens)
        self._engine.checks.on_answer(self._engine, request, tokens, begun_ms)
        return tokens, beside

    def on_allocated(self, request: Request, blocks: Sequence[Sequence[int]], tokens: int) -> None:
        self.side.on_allocated(request, blocks, tokens)
        self._engine.checks.on_allocated(self._engine, request, tokens)

    def build_plan(self, step: Step) -> None:
        plan = self.side.take_loads()
        for request_id in sorted(step.preempted):
            if request_id not in step.parts:
                self.side.on_preempted(request_id)
        self.side.add_stores(
            plan,
            [
                (part.request_id, part.computed + part.tokens, lambda tables=part.tables: tables)
                for part in step.parts.values()
            ],
        )
        step.plan = plan

    def on_finished(self, request_id: str) -> None:
        self.side.on_finished(request_id)

    def on_results(self, results: Results) -> None:
        outcome = None
        for said in results.outcomes:
            assert isinstance(said, Outcome)
            outcome = said if outcome is None else outcome.merged(said)
        if outcome is not None:
            self.side.on_outcome(outcome)

    def has_pending_work(self) -> bool:
        return self.side.jobs.begun_since(self._engine.time.now_ms - PENDING_MS_MAX)


class Engine:
    def __init__(  # noqa: PLR0917  all of a world meets in an engine
        self,
        name: str,
        model: Model,
        options: Options,
        timing: Timing,
        network: Network,
        server: CacheProcess,
        rng: Random,
        checks: "object",
        speed: Speed,
    ) -> None:
        self.name = name
        self.model = model
        self.options = options
        self.time = network.time
        self.rng = rng
        self.checks = checks
        self.process = Process(self.time, rng)  # the scheduler's; an only worker is in it as well
        self.rank_processes = [
            self.process if model.ranks == 1 else Process(self.time, rng) for _ in range(model.ranks)
        ]
        self.owner = owner_of(name)
        self.inbox: deque[Request] = deque()
        self.aborts: deque[str] = deque()
        self.step_ms_max = 3
        self.drift_ms_max = 0  # between ranks
        self.idle_ms = 1  # between steps that compute nothing
        self.weights = model.weights
        self.reset_wanted = False
        self._under_way: deque[Step] = deque()
        self._todo: deque[Step] = deque()  # by the workers
        self._ready: deque[tuple[Step, Results]] = deque()
        self._at_work = False  # the workers are
        self._due = False  # a turn of the loop is
        size = model.size
        self.members = [
            SimMember(self._registration(rank), process, network, server, rng, timing, checks.gates.on_step)
            for rank, process in zip(
                (None, *range(model.ranks)), (self.process, *self.rank_processes), strict=True
            )
        ]
        gate = self.members[0]
        self.ranks = [Rank(rank, model, self.owner, self.time, rng, speed) for rank in range(model.ranks)]
        sizes = tuple(model.part_bytes for _ in size.windows)
        self.workers = [
            WorkerSide(
                rank.transfer,
                Part(rank.part, sizes, model.page_bytes, stores=rank.number % model.replicas == 0),
                lambda member=member: member.map,
                lambda process=process: process.clock() * 1_000_000,
            )
            for rank, process, member in zip(self.ranks, self.rank_processes, self.members[1:], strict=True)
        ]
        self.link = SimLink(network, server, self.process)
        self.client = WatchedClient(self)
        self.scheduler = Scheduler(size, None)
        around = Surroundings(
            options,
            model.layout,
            self.client,
            gate,
            self.scheduler.pool,
            workers=model.ranks,
            caches_locally=size.local_cache,
            steps_overlap=size.depth > 1,
            clock=self.process.clock,
            draw_epoch=lambda: self.weights + 1 - model.weights,  # who has the same weights has the same keys
        )
        self.side = SchedulerSide(around, Pace(model.page_bytes))
        self.connector = self.scheduler.connector = Connector(self, self.side)
        self.runner = Runner(self.ranks, size.windows, size.block_tokens, lambda: self.weights)
        self._aggregator = Aggregator(model.ranks)

    def start(self) -> None:
        for member in self.members:
            member.start()

    def die(self) -> None:
        """All of its processes, one after the other; copies that a device has begun go on a little longer."""
        for process in self.processes:
            process.is_dead = True
        self.link.close()
        for member, rank in zip(self.members, (None, *self.ranks), strict=True):
            ends_ms = self.time.now_ms + self.rng.choice((0, self.rng.randint(0, 1_500)))
            self.time.at(ends_ms, member.die)
            if rank is not None:
                rank.dead_ms = ends_ms + self.rng.randint(1, 400)

    def lose_rank(self, number: int) -> None:
        """One of its processes dies; the others live on, and go no step further."""
        self.members[1 + number].die()
        self.ranks[number].dead_ms = self.time.now_ms + self.rng.randint(1, 400)

    @property
    def processes(self) -> list[Process]:
        return list(dict.fromkeys((self.process, *self.rank_processes)))

    # The world's side

    def ask(self, request: Request) -> None:
        self.inbox.append(request)
        self._turn_soon()

    def abort(self, request_id: str) -> None:
        self.aborts.append(request_id)
        self._turn_soon()

    def update_weights(self) -> None:
        self.reset_wanted = True
        self._turn_soon()

    @property
    def unfinished(self) -> int:
        return len(self.inbox) + len(self.scheduler.requests)

    # The loop: `EngineCore.step` or `step_with_batch_queue`

    def _turn_soon(self, ms: int = 0) -> None:
        if not self._due and not self.process.is_dead:
            self._due = True
            self.time.after(ms, lambda: self.process.run(self._turn))

    def _turn(self) -> None:
        # `_due` stays set: waiting in here for a reply is no reason to come in again.
        while self.inbox:
            self.scheduler.add(self.inbox.popleft())
        self._take_aborts()
        if self.reset_wanted:
            self._reset()
        pause_ms = self._step_or_update()
        self._due = False
        if pause_ms is not None:
            self._turn_soon(pause_ms)

    def _step_or_update(self) -> int | None:
        """-> when to go on; None: when something has happened"""
        depth = self.model.size.depth
        if len(self._under_way) < depth and self.scheduler.has_requests():
            step = self.scheduler.schedule()
            self.checks.on_step(self, step)
            self._under_way.append(step)
            self._todo.append(step)
            self._work()
            if len(self._under_way) < depth and (step.parts or self.scheduler.has_requests()):
                return 0 if step.parts else 1
        if not self._ready:
            return 0 if self.inbox or self.aborts else None
        step, results = self._ready.popleft()
        assert self._under_way.popleft() is step
        self._take_aborts()
        self.checks.on_results(self, step, results)
        self.scheduler.update(step, results)
        return 0 if step.parts else self.idle_ms

    def _reset(self) -> None:
        """With other weights all KV is worth nothing: vLLM's own cache and ours are emptied."""
        self.reset_wanted = False
        if self.scheduler.reset_prefix_cache():
            self.side.reset()
            self.weights += 1
            self.checks.on_reset(self)

    def _take_aborts(self) -> None:
        while self.aborts:
            request_id = self.aborts.popleft()
            if request_id in self.scheduler.requests:
                self.checks.on_abort(self.scheduler.requests[request_id])
            self.scheduler.abort([request_id])

    # The workers' steps, one after the other

    def _work(self) -> None:
        if not self._at_work and self._todo:
            self._at_work = True
            StepRun(self, self._todo.popleft(), self._aggregator, self._end_work).begin()

    def _end_work(self, step: Step, results: Results) -> None:
        self._at_work = False
        self._ready.append((step, results))
        self._turn_soon()
        self._work()

    def _registration(self, rank: int | None) -> m.Register:
        model = self.model
        wire = None if rank is None else model.wire_layout(rank)
        told = registration(self.name, rank or 0, model.ranks, model.namespace, wire)
        role = "scheduler" if rank is None else f"worker{rank}"
        proof = f"{owner_of(self.name).hex()}.{role}"
        return msgspec.structs.replace(told, proof=proof, phase="ready", pid=1)
