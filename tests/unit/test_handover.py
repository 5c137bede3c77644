"""Which slabs a slot size gives up, and that this never takes the main loop long."""

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_server.arena import Arena
from cache_server.eviction import Lru
from cache_server.handover import Bounds, Handover
from cache_server.index import Chunk, Index, Space
from cache_server.protocol import messages as m
from cache_server.protocol.keys import SlotRef
from cache_server.protocol.messages import Code, Outcome
from cache_server.protocol.slots import Entry, Geometry
from cache_server.report import describe
from cache_server.storage import Shortage, Storage
from kit import KIB, Peer, RefusedError, World, chain, new_file

SMALL, BIG = 4 * KIB, 32 * KIB
PER_SLAB = BIG // SMALL
A, B = b"engine A's owner", b"engine B's owner"
SIZES = [SMALL, BIG]
STEPS = ["ask", "tick", "lease", "unlease", "use", "store"]
LITTLE = Bounds(looked_at_max=8, sample_max=2, family_max=4, dropped_max=3)


class CountedArena(Arena):
    looks = 0

    def entry(self, number: int) -> Entry | None:
        self.looks += 1
        return super().entry(number)


class Disk:
    """An arena and the storage over it, which does little at a time."""

    def __init__(self, slabs: int = 4, bounds: Bounds = LITTLE) -> None:
        self.geometry = Geometry(slabs * BIG, BIG)
        self.file = new_file(self.geometry)
        self.bounds = bounds
        self.start(1)

    def start(self, boots: int) -> None:
        self.arena = CountedArena(self.file, self.geometry, boots)
        self.index = Index(Lru)
        self.storage = Storage(self.arena, self.index)
        self.storage._handover.bounds = self.bounds

    @property
    def handover(self) -> Handover:
        return self.storage._handover

    @property
    def space(self) -> Space:
        return self.index.space(b"prefix of small.", 0, SMALL, 0)

    def fill(self, count: int, length: int = 1) -> list[Chunk]:
        """Chains of so many chunks, slot after slot."""
        chunks: list[Chunk] = []
        for number in range(count // length):
            hashes = chain(length, f"chain {number}")
            slots = self.reserve(SMALL, length, A)
            names = [(slot.generation, slot.number) for slot in slots]
            outcomes = self.storage.commit(self.space, A, b"", list(zip(hashes, names, strict=True)))
            assert set(outcomes) == {Outcome.STORED}
            chunks += [self.space.chunks[hash_] for hash_ in hashes]
        return chunks

    def reserve(self, size: int, count: int, owner: bytes) -> list[SlotRef]:
        slots = self.storage.reserve(size, count, owner, SIZES)
        assert not isinstance(slots, Shortage), slots
        return slots

    def ask(self) -> list[SlotRef] | Shortage:
        return self.storage.reserve(BIG, 1, B, SIZES)

    def slabs_of(self, chunks: Sequence[Chunk]) -> set[int]:
        return {self.arena.slab_of(chunk.slot.number).number for chunk in chunks}

    def emptied(self) -> list[int]:
        """How many chunks leave in each tick, until nothing is leaving."""
        left: list[int] = []
        while self.handover.leaving is not None:
            before = len(self.index)
            self.storage.hand_over()
            left.append(before - len(self.index))
            self.check()
        return left

    def check(self) -> None:
        usage = self.arena.usage()
        assert usage.free + usage.reserved + usage.committed + usage.waste == usage.capacity
        assert usage.committed == len(self.index) * SMALL
        assert self.arena.available(SMALL) * SMALL <= usage.free


@pytest.fixture
def disk() -> Disk:
    return Disk()


# --- emptied tick by tick


def test_a_large_slab_changes_hands_in_small_steps(disk: Disk) -> None:
    chunks = disk.fill(32)
    assert disk.ask() is Shortage.LEAVING
    assert len(disk.index) == 32, "what is refused drops nothing"
    assert disk.ask() is Shortage.LEAVING
    assert disk.emptied() == [3, 3, 2]
    assert [chunk.stored for chunk in chunks] == [False] * 8 + [True] * 24
    assert disk.storage.evicted == 8
    (slot,) = disk.reserve(BIG, 1, B)
    assert slot.number == 0


def test_with_a_slab_goes_what_hangs_on_it_children_first(disk: Disk) -> None:
    chunks = disk.fill(32, length=16)
    assert disk.ask() is Shortage.LEAVING
    while disk.handover.leaving is not None:
        disk.storage.hand_over()
        assert all(chunk.parent is None or chunk.parent.stored for chunk in chunks if chunk.stored)
    assert sum(chunk.stored for chunk in chunks) == 16
    assert disk.storage.evicted == 16
    disk.reserve(BIG, 1, B)


def test_the_steps_are_as_small_where_little_is_left_in_a_slab(disk: Disk) -> None:
    chunks = disk.fill(32)
    last = chunks[7]
    leaving = disk.index.family(chunks[:7])
    disk.index.drop(leaving)
    for chunk in leaving:
        disk.arena.free(chunk.slot)
    disk.handover.bounds = Bounds(looked_at_max=3, sample_max=2, family_max=4, dropped_max=3)
    disk.handover._close(disk.arena.slab_of(last.slot.number), None)
    for _ in range(3):
        before = disk.arena.looks
        disk.storage.hand_over()
        assert disk.arena.looks - before <= 3 + 1
    assert not last.stored
    assert disk.handover.leaving is None


def test_nobody_reserves_in_a_slab_that_is_leaving(disk: Disk) -> None:
    disk.fill(31)
    assert disk.arena.available(SMALL) == 1
    assert disk.ask() is Shortage.LEAVING
    disk.storage.hand_over()
    leaving = disk.handover.leaving
    assert leaving is not None
    assert len(leaving.free) == 3
    for slot in disk.reserve(SMALL, 4, A):
        assert disk.arena.slab_of(slot.number) is not leaving
        disk.arena.abort(A, slot.number)
    disk.check()
    disk.emptied()
    assert disk.arena.slab_of(disk.reserve(BIG, 1, B)[0].number) is leaving


def test_an_eviction_gives_what_was_asked_beside_what_is_leaving(disk: Disk) -> None:
    chunks = disk.fill(32)
    assert disk.ask() is Shortage.LEAVING
    leaving = disk.handover.leaving
    assert {chunk.slot.number for chunk in chunks[:8]} == set(disk.arena.numbers(leaving))
    slots = disk.reserve(SMALL, 2, A)  # the coldest are in there
    assert {slot.number for slot in slots} == {chunk.slot.number for chunk in chunks[8:10]}
    assert not any(chunk.stored for chunk in chunks[:10])
    disk.check()
    disk.storage.hand_over()
    disk.reserve(BIG, 1, B)


def test_an_eviction_that_can_not_give_enough_changes_nothing(disk: Disk) -> None:
    chunks = disk.fill(32)
    assert disk.ask() is Shortage.LEAVING
    for chunk in chunks[8:]:
        disk.index.lease(chunk)
    assert isinstance(disk.storage.reserve(SMALL, 1, A, SIZES), Shortage)
    assert all(chunk.stored for chunk in chunks)


# --- kept after all


def test_a_lease_that_is_taken_meanwhile_keeps_the_slab(disk: Disk) -> None:
    chunks = disk.fill(32)
    assert disk.ask() is Shortage.LEAVING
    disk.storage.hand_over()
    disk.index.lease(chunks[5])
    disk.emptied()
    assert [chunk.stored for chunk in chunks[:8]] == [False] * 5 + [True] * 3
    assert disk.arena.available(SMALL) == 5, "its size has it again"
    assert disk.ask() is Shortage.LEAVING, "another one goes"
    disk.emptied()
    disk.reserve(BIG, 1, B)
    assert chunks[5].stored


def test_what_the_sample_did_not_show_keeps_the_slab_if_others_are_colder(disk: Disk) -> None:
    chunks = disk.fill(32)
    disk.index.use(disk.space, [chunks[6].hash], 1)  # in the first slab, and not in the sample
    assert disk.ask() is Shortage.LEAVING
    disk.emptied()
    assert chunks[6].stored
    assert disk.ask() is Shortage.LEAVING
    disk.emptied()
    disk.reserve(BIG, 1, B)
    assert chunks[6].stored


def test_the_last_slab_that_could_go_goes_however_warm(disk: Disk) -> None:
    chunks = disk.fill(32)
    for chunk in chunks[8:]:
        disk.index.lease(chunk)
    disk.index.use(disk.space, [chunks[6].hash], 1)
    assert disk.ask() is Shortage.LEAVING
    disk.emptied()
    assert not any(chunk.stored for chunk in chunks[:8])
    disk.reserve(BIG, 1, B)


def test_a_slab_that_was_emptied_otherwise_has_left(disk: Disk) -> None:
    disk.fill(32)
    assert disk.ask() is Shortage.LEAVING
    disk.storage.clear(disk.index.spaces)
    disk.reserve(BIG, 4, B)
    disk.storage.hand_over()
    assert disk.handover.leaving is None
    disk.check()


def test_a_new_server_finds_a_slab_that_was_leaving_as_it_was(disk: Disk) -> None:
    disk.fill(32)
    assert disk.ask() is Shortage.LEAVING
    disk.storage.hand_over()
    disk.start(2)
    assert disk.storage.restored == 29
    assert disk.arena.available(SMALL) == 3
    disk.check()


# --- the choice


def test_what_follows_a_chunk_tells_how_warm_it_is() -> None:
    """A found prefix is noted at its end."""
    disk = Disk(bounds=Bounds())
    hashes = chain(16)
    for first in (0, 8):
        slots = disk.reserve(SMALL, 8, A)
        names = [(slot.generation, slot.number) for slot in slots]
        parent = hashes[first - 1] if first else b""
        disk.storage.commit(disk.space, A, parent, list(zip(hashes[first : first + 8], names, strict=True)))
    others = disk.fill(16)
    disk.index.use(disk.space, hashes, 16)
    disk.reserve(BIG, 1, B)
    assert all(disk.space.chunks[hash_].stored for hash_ in hashes)
    assert sum(chunk.stored for chunk in others) == 8


def test_a_search_looks_at_few_chunks_and_the_next_one_at_others() -> None:
    disk = Disk(slabs=16)
    chunks = disk.fill(16 * PER_SLAB)
    chosen: set[int] = set()
    for _ in range(4):
        disk.arena.looks = 0
        assert disk.ask() is Shortage.LEAVING
        assert disk.arena.looks <= LITTLE.looked_at_max + LITTLE.sample_max
        assert disk.handover.leaving is not None
        chosen.add(disk.handover.leaving.number)
        disk.index.lease(chunks[disk.handover.leaving.number * PER_SLAB + 1])
        disk.emptied()
    assert len(chosen) == 4


def test_a_search_that_finds_leases_only_ends_as_soon() -> None:
    disk = Disk(slabs=16)
    for chunk in disk.fill(16 * PER_SLAB):
        disk.index.lease(chunk)
    disk.arena.looks = 0
    assert disk.ask() is Shortage.FULL
    assert disk.arena.looks <= LITTLE.looked_at_max + LITTLE.sample_max


def test_as_many_slabs_go_at_once_as_are_emptied_in_one_step() -> None:
    disk = Disk(bounds=Bounds(dropped_max=2 * PER_SLAB - 1))
    disk.fill(32)
    assert disk.storage.reserve(BIG, 2, B, SIZES) is Shortage.LEAVING
    assert disk.handover.leaving is not None
    assert len(disk.index) == 32
    assert disk.emptied() == [8]
    assert len(disk.reserve(BIG, 2, B)) == 2


# --- all of it


class Walk:
    """Of one who wants a share, and of what happens meanwhile."""

    def __init__(self, length: int) -> None:
        self.disk = Disk()
        self.chunks = self.disk.fill(32, length)
        self.leased: dict[Chunk, None] = {}

    def ask(self, _: Chunk) -> None:
        self.disk.ask()

    def tick(self, _: Chunk) -> None:
        self.disk.storage.hand_over()

    def store(self, _: Chunk) -> None:
        self.disk.storage.reserve(SMALL, 1, A, SIZES)
        self.disk.storage.abort_all(A)

    def lease(self, chunk: Chunk) -> None:
        if chunk.stored and chunk not in self.leased:
            self.disk.index.lease(chunk)
            self.leased[chunk] = None

    def unlease(self, _: Chunk) -> None:
        if self.leased:
            self.disk.index.unlease(self.leased.popitem()[0])

    def use(self, chunk: Chunk) -> None:
        if chunk.stored and chunk.depth == 1:
            self.disk.index.use(self.disk.space, [chunk.hash], 1)

    def end(self) -> None:
        while self.leased:
            self.unlease(self.chunks[0])
        for _ in range(100):
            if isinstance(self.disk.ask(), Shortage):
                self.disk.emptied()


@given(
    st.sampled_from([1, 2, 8, 32]),
    st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 31)), max_size=40),
)
def test_whatever_happens_every_byte_is_accounted_for_and_no_leased_chunk_leaves(
    length: int, steps: list[tuple[str, int]]
) -> None:
    walk = Walk(length)
    for step, number in steps:
        getattr(walk, step)(walk.chunks[number])
        walk.disk.check()
        assert all(chunk.stored for chunk in walk.leased)
    walk.end()
    assert len(walk.disk.arena.slabs_of(BIG)) >= 2, "it has its share in the end"


def test_who_waits_for_space_that_is_leaving_is_told_to_ask_again() -> None:
    world = World(4 * BIG, BIG)
    world.service.storage._handover.bounds = LITTLE
    small = Peer(world, "small", namespace=b"small").start()
    big = Peer(world, "big", (m.Group(BIG),), b"big").start()
    for number in range(4 * PER_SLAB):
        small.store(chain(1, f"chunk {number}"))
    with pytest.raises(RefusedError, match="is being emptied: ask again in a second") as refused:
        big.reserve(1)
    assert refused.value.code == Code.BUSY
    world.pass_ms(100)
    told = {slot.slot_bytes: slot.free for slot in describe(world.service, world.now_ms, 1, 0, "").slots}
    assert told == {SMALL: 0}, "nobody gets what is free there"
    for _ in range(2):
        world.pass_ms(100)
    assert len(big.reserve(1)) == 1
