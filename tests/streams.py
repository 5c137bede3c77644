"""CUDA's streams and events, simulated: what is enqueued runs later, in any order that the streams allow."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random

import torch

from lmconnector.transfer.base import Copy
from lmconnector.transfer.cuda import Enqueue, one_by_one
from lmconnector.transfer.runs import Spans

Work = Callable[[], None]


class Mark:
    """What one record of an event puts into a stream."""

    reached_at = 0  # the world's step; 0: not yet

    @property
    def reached(self) -> bool:
        return self.reached_at > 0


class Stream:
    def __init__(self, world: "SimCuda", name: str) -> None:
        self.world = world
        self.name = name
        self.queue: deque[Work | Mark | tuple[Mark]] = deque()  # work, a record, a wait for a record
        self.held = False  # does nothing, as a slow one

    def wait_event(self, event: "Event") -> None:
        if event.mark is not None:
            self.queue.append((event.mark,))

    def wait_stream(self, other: "Stream") -> None:
        event = Event(self.world)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.world.run(lambda: not self.queue)

    @property
    def runnable(self) -> bool:
        if self.held or not self.queue:
            return False
        head = self.queue[0]
        return not isinstance(head, tuple) or head[0].reached

    def run_one(self) -> None:
        head = self.queue.popleft()
        if isinstance(head, Mark):
            head.reached_at = self.world.steps
        elif not isinstance(head, tuple):
            head()


class Event:
    def __init__(self, world: "SimCuda", *, timed: bool = False) -> None:
        self.world = world
        self.timed = timed
        self.mark: Mark | None = None

    def record(self, stream: Stream) -> None:
        self.mark = Mark()
        stream.queue.append(self.mark)

    def query(self) -> bool:
        return self.mark is None or self.mark.reached

    def synchronize(self) -> None:
        self.world.run(self.query)

    def elapsed_time(self, end: "Event") -> float:
        """ms: a step of the world takes one"""
        for event in (self, end):
            assert event.timed, "made without `enable_timing`"
            assert event.mark is not None, "never recorded"
            assert event.mark.reached
        return float(end.mark.reached_at - self.mark.reached_at)


class SimCuda:
    """In place of `torch.cuda`; `compute` is the stream of the engine."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.steps = 0
        self.streams: list[Stream] = []
        self.compute = self.Stream("compute")
        self._lock = threading.RLock()
        self._current = threading.local()

    def Stream(self, device: object) -> Stream:  # noqa: N802  torch.cuda's names
        self.streams.append(Stream(self, str(device)))
        return self.streams[-1]

    def Event(self, enable_timing: bool = False, blocking: bool = False) -> Event:  # noqa: N802
        return Event(self, timed=enable_timing)

    def current_stream(self, device: object = None) -> Stream:
        return getattr(self._current, "stream", self.compute)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._current.stream = before

    @contextmanager
    def device(self, device: object) -> Iterator[None]:
        yield

    def launch(self, work: Work) -> None:
        self.current_stream().queue.append(work)

    def run(self, until: Callable[[], bool]) -> None:
        while not until():
            self.step()

    def step(self) -> None:
        """One step of any stream that can make one."""
        with self._lock:
            able = [stream for stream in self.streams if stream.runnable]
            if able:
                self.steps += 1
                self.random.choice(able).run_one()
            else:
                os.sched_yield()  # a thread will enqueue more, or a stream is held

    def run_only(self, stream: Stream) -> None:
        with self._lock:
            while stream.queue:
                assert stream.runnable, f"{stream.name} waits for another stream"
                self.steps += 1
                stream.run_one()

    def settle(self) -> None:
        self.run(lambda: not any(stream.queue for stream in self.streams))

    def enqueue(self, regions: Sequence[torch.Tensor], fail_after: int | None = None) -> Enqueue:
        """Each span by itself; with `fail_after` the driver refuses the next one."""
        copy_now = one_by_one(regions)

        def enqueue(spans: Spans, copies: Sequence[Copy], to_kv: bool) -> None:
            for at in range(len(spans.size)):
                if at == fail_after:
                    raise RuntimeError("the driver refuses a copy")
                span = Spans(*(column[at : at + 1] for column in spans))
                self.launch(lambda span=span: copy_now(span, copies, to_kv))

        return enqueue
