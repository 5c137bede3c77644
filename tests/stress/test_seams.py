"""What lies below the simulated ports: each seam that threads share, with many threads and hasty switches."""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cache_server.beats import Bounds, Part
from cache_server.faults import Faults
from cache_server.protocol import messages as m
from cache_server.protocol.slots import FORMAT_VERSION, Geometry, write_header
from cache_server.shm import Populator, open_arena
from health.world import world_of
from kit import new_file
from lmconnector.arena import ArenaMap
from lmconnector.config import Options
from lmconnector.geometry import GroupLayout
from lmconnector.health import State, Timing
from lmconnector.heartbeat import Heartbeat, Membership
from lmconnector.link import Event
from lmconnector.membership import Member, registration
from lmconnector.transfer import Copy
from lmconnector.transfer.attaching import Attachments
from lmconnector.transfer.cpu import CpuTransfer
from processes import eventually, short_dir
from threads import hammered, hasty, race

THREADS = 16
STORM_S = 0.5
JOIN_MS = 10_000
TIMING = Timing(interval_ms=8, timeout_ms=8, recover_timeout_ms=1_000, hold_ms_max=16)
MIB = 1 << 20
SMALL = Geometry(4 * MIB, MIB)


@pytest.fixture(autouse=True)
def _hasty() -> Iterator[None]:
    with hasty():
        yield


@pytest.fixture(autouse=True)
def bugs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BaseException | None]]:
    """What ended a thread that nobody waits for: nothing may."""
    found: list[BaseException | None] = []
    monkeypatch.setattr(threading, "excepthook", lambda hook: found.append(hook.exc_value))
    yield found
    assert found == []


class Echo:
    """A server that answers at once; `known` may change at any time."""

    def __init__(self) -> None:
        self.known = True
        self.asked = 0  # pings sent, and registrations begun
        self.sent_by: set[int] = set()
        self._events: deque[Event] = deque()
        self._woken = threading.Event()

    def send(self, request: m.Request) -> bool:
        assert isinstance(request, m.Ping)
        self.asked += 1
        self.sent_by.add(threading.get_ident())
        self._events.append(
            m.Pong(id=request.id, boot=7, seq=request.seq, known=self.known, state="ready", progress=0,
                   silence_ms=0)
        )  # fmt: skip
        return True

    def poll(self, timeout_ms: int) -> list[Event]:
        if timeout_ms and not self._events:
            self._woken.wait(timeout_ms / 1_000)
        self._woken.clear()
        return [self._events.popleft() for _ in range(len(self._events))]

    def wake(self) -> None:
        self._woken.set()

    def close(self) -> None: ...


class Rig:
    def __init__(self) -> None:
        self.link = Echo()
        self.links = 0
        self.heart = Heartbeat(self._new_link, self._register, TIMING)

    def _new_link(self) -> Echo:
        self.links += 1
        return self.link

    def _register(self) -> Membership:
        self.link.asked += 1
        return Membership(70, 7)


def test_of_many_starts_and_stops_at_most_one_beats_and_none_afterwards() -> None:
    for _ in range(30):
        rig = Rig()
        heart = rig.heart
        race(
            THREADS,
            lambda number, heart=heart: heart.stop(JOIN_MS) if number == 5 else heart.ensure_started(),
        )
        heart.ensure_started()
        assert rig.links <= 1
        assert len(rig.link.sent_by) <= 1
        assert not heart.usable
        assert heart.health.state in (State.DORMANT, State.STOPPED)


def test_after_a_disappointment_only_what_is_asked_later_opens_the_gate() -> None:
    rig = Rig()
    rig.heart.ensure_started()
    eventually(lambda: rig.heart.usable, "usable")
    rounds = Counter[str]()

    def wait_in_vain() -> None:
        asked = rig.link.asked
        rig.heart.disappointed()
        if rig.heart.usable:
            rounds["open again"] += 1
            assert rig.link.asked > asked, "the gate was opened by what was asked before"
        rounds["all"] += 1
        time.sleep(0.002)

    def say_other_things() -> None:
        rig.heart.forgotten(70)
        rig.heart.forgotten(69)
        rig.heart.succeeded()
        time.sleep(0.003)

    with hammered(wait_in_vain, THREADS // 2), hammered(say_other_things, THREADS // 2):
        time.sleep(STORM_S)
    assert rounds["all"] > THREADS
    eventually(lambda: rig.heart.usable, "usable again")
    rig.heart.stop(JOIN_MS)
    for late in (rig.heart.disappointed, rig.heart.succeeded, rig.heart.forgotten):
        late()
    assert not rig.heart.usable


def test_a_stop_amid_all_that_is_said_leaves_the_gate_shut() -> None:
    for _ in range(20):
        rig = Rig()
        rig.heart.ensure_started()
        saying = (rig.heart.disappointed, rig.heart.succeeded, rig.heart.forgotten, rig.heart.ensure_started)

        def say(number: int, rig: Rig = rig, saying: tuple = saying) -> None:
            if number == 3:
                rig.heart.stop(JOIN_MS)
                assert not rig.heart.usable
            for _ in range(20):
                saying[number % len(saying)]()

        race(THREADS, say)
        assert not rig.heart.usable
        assert rig.heart.health.state is State.STOPPED


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what vLLM imports
def test_every_change_is_told_to_the_metrics_once() -> None:
    """As many ways lead into each state as out of it."""
    from lmconnector.metrics import Meter

    rig = Rig()
    rig.heart.ensure_started()
    meter, told = Meter("scheduler", rig.heart, lambda: 0), Counter[str]()
    end_s = time.monotonic() + STORM_S

    def doubt() -> None:
        rig.link.known = not rig.link.known
        rig.heart.disappointed()
        time.sleep(0.001)

    def tell() -> None:
        stats = meter.take()
        told.update(stats.data["counts"] if stats else {})

    with hammered(doubt):
        while time.monotonic() < end_s:
            tell()
    rig.heart.stop(JOIN_MS)
    tell()
    balance: Counter[str] = Counter()
    for name, count in told.items():
        old, _, new = name.removeprefix("transitions/").partition(" to ")
        balance[new] += count
        balance[old] -= count
    assert sum(told.values()) > THREADS
    assert {state: count for state, count in balance.items() if count} == {"dormant": -1, "stopped": 1}


class Memory:
    """Stands in for a driver: counts what is prepared, slowly."""

    done, advice = "counted", ""

    def __init__(self) -> None:
        self.prepared: Counter[int] = Counter()

    def prepare(self, address: int, size_bytes: int) -> int:
        self.prepared[address] += 1
        assert self.prepared[address] == 1, "prepared twice"
        return 0

    def forget(self, address: int) -> int:
        self.prepared[address] -= 1
        assert self.prepared[address] == 0, "forgotten without having been prepared"
        return 0

    def explain(self, code: int) -> str:
        return str(code)


class Arenas(Member):
    """A worker to whom each registration tells of another arena."""

    def __init__(self, directory: Path, transfer: CpuTransfer) -> None:
        told = registration("engine", 0, 1, b"", m.Layout(groups=(m.Group(4096),)))
        super().__init__(Options(dir=str(directory)), told, transfer)
        self._directory = directory
        self._count = 0

    @staticmethod
    def _new_file(arena_id: bytes) -> memoryview:
        file = new_file(SMALL)
        write_header(file, SMALL, arena_id)
        return file

    def _ask_to_register(self, phase: m.Phase, deadline_ms: int) -> m.Registered:
        self._count += 1
        arena_id = b"arena %010d" % self._count
        path = self._directory / f"arena-{self._count}"
        path.write_bytes(self._new_file(arena_id))
        arena = m.Arena(str(path), arena_id, FORMAT_VERSION, SMALL.file_bytes, SMALL.capacity_bytes)
        return m.Registered(
            id=1,
            boot=7,
            version=1,
            features=(),
            session=self._count,
            arena=arena,
            lease_ms=1,
            silent_after_ms=9_999,
        )


def attach_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lmconnector-attach"]


def test_of_arenas_that_follow_each_other_at_once_only_the_last_is_attached() -> None:
    memory = Memory()
    with short_dir() as directory:
        transfer = CpuTransfer([torch.zeros(4, 4096, dtype=torch.uint8)], [GroupLayout(16, 1, 0)])
        transfer._attachments = Attachments(memory)
        member = Arenas(directory, transfer)
        seen: list[ArenaMap | None] = []
        with hammered(lambda: seen.append(member.map)):
            for _ in range(40):
                member._register()
        assert set(seen) - {None} <= {one for one in seen if one is None or one.id}, "whole at any moment"
        eventually(lambda: attach_threads() == [], "all attached")
        assert member.map is not None
        attached = [address for address, count in memory.prepared.items() if count]
        assert attached == [member.map.data.data_ptr()], f"{len(attached)} arenas are attached"
        transfer.close()
        assert not any(memory.prepared.values())


def test_each_slab_that_is_populated_is_taken_once() -> None:
    with short_dir() as directory:
        file = open_arena(directory / "arena", 64 * MIB, 0o600)
        slabs = list(range(file.geometry.slabs))
        part = Part("populate", Bounds(60_000, 60_000), critical=False)
        populator = Populator(file, slabs, part, Faults(directory))
        taken: list[int] = []
        with hammered(lambda: part.judge(10**9, 0)):
            populator.start()
            eventually(
                lambda: taken.extend(populator.take_finished()) or len(taken) == len(slabs), "populated"
            )
        populator.stop()
        assert taken == slabs
        assert populator.take_finished() == []


def test_a_copy_that_has_ended_is_there_whoever_asks() -> None:
    """Loads beside, polled by one thread while the copy's own runs and others want the interpreter."""
    pages = 64
    region = torch.zeros(pages, 4096, dtype=torch.uint8)
    transfer = CpuTransfer([region], [GroupLayout(16, pages, 0)])
    with hammered(lambda: sum(range(50))):
        for number in range(1, 30):
            source = torch.full((pages * 4096,), number % 251, dtype=torch.uint8)
            ticket = transfer.load_beside([Copy(source, 0, 0, tuple(range(pages)))])
            while not ticket.done():
                time.sleep(0)
            ticket.result()
            assert bool((region == number % 251).all()), "told as done before it was"
    transfer.close()


def test_whoever_asks_for_a_deep_answer_gets_one_and_every_snapshot_is_whole() -> None:
    with world_of() as world:
        world.started()
        torn = Counter[str]()

        def look() -> None:
            told, published = world.watch.told, world.watch.source()
            torn["looks"] += 1
            last = told.verdict.transitions[-1]
            assert last.new is told.verdict.state
            assert told.verdict.transition_counts[last.old.value, last.new.value, last.code] > 0
            assert published.endpoints is not None
            time.sleep(0.001)

        running = threading.Event()

        def run() -> None:
            world.run(50)
            running.set()

        lock = threading.Lock()

        def ask() -> None:
            with lock:  # the HTTP side is one thread
                generation = world.watch.ask_deep()
                eventually(lambda: world.watch.told.record.generation >= generation, "an outcome")
                torn["asked"] += 1

        with hammered(run, 1), hammered(look, THREADS // 2), hammered(ask, 2):
            time.sleep(2 * STORM_S)
        assert torn["asked"] > 3
        assert running.is_set()
