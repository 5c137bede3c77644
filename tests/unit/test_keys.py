"""What a key stands for, and how references are packed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_server.protocol.keys import (
    HASH_BYTES,
    OWNER_BYTES,
    PREFIX_BYTES,
    SLOT_NAME_BYTES,
    SLOT_REF,
    Hashes,
    SlotRef,
    key_prefix,
    owner_of,
    pack_slot_names,
    split_slot_names,
    split_slot_refs,
)

GEOMETRY = st.lists(st.lists(st.integers(0, 2**40), max_size=4).map(tuple), max_size=4).map(tuple)
FIELDS = st.tuples(st.binary(min_size=1, max_size=64), st.integers(0, 2**48), GEOMETRY)
REFS = st.builds(SlotRef, st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))


@given(FIELDS, FIELDS)
def test_a_prefix_is_one_namespace_epoch_and_geometry(
    one: tuple[bytes, int, tuple[tuple[int, ...], ...]], two: tuple[bytes, int, tuple[tuple[int, ...], ...]]
) -> None:
    assert (key_prefix(*one) == key_prefix(*two)) == (one == two)
    assert len(key_prefix(*one)) == PREFIX_BYTES


def test_no_field_runs_into_its_neighbour() -> None:
    prefixes = [
        key_prefix(b"a", 0, []),
        key_prefix(b"a", 0, [()]),
        key_prefix(b"a", 0, [(), ()]),
        key_prefix(b"a", 0, [(1, 2)]),
        key_prefix(b"a", 0, [(1,), (2,)]),
        key_prefix(b"a", 0, [(1,), (), (2,)]),
        key_prefix(b"a\0", 0, []),
        key_prefix(b"a", 1, []),
    ]
    assert len(set(prefixes)) == len(prefixes)


@given(st.lists(REFS, max_size=8))
def test_references_come_back_as_they_were(refs: list[SlotRef]) -> None:
    assert split_slot_refs(b"".join(SLOT_REF.pack(*ref) for ref in refs)) == refs
    names = pack_slot_names(refs)
    assert len(names) == len(refs) * SLOT_NAME_BYTES
    assert split_slot_names(names) == [(ref.generation, ref.number) for ref in refs]


@given(
    st.lists(st.binary(min_size=HASH_BYTES, max_size=HASH_BYTES), max_size=8),
    st.slices(8),
)
def test_packed_hashes_are_a_sequence(hashes: list[bytes], part: slice) -> None:
    packed = Hashes(b"".join(hashes))
    assert list(packed) == hashes
    assert len(packed) == len(hashes)
    assert list(packed[part]) == hashes[part]
    assert [packed[at] for at in range(-len(hashes), len(hashes))] == 2 * hashes
    for at in (len(hashes), -len(hashes) - 1):
        with pytest.raises(IndexError):
            packed[at]


def test_an_engine_has_one_mark() -> None:
    assert owner_of("engine") == owner_of("engine") != owner_of("other")
    assert len(owner_of("engine")) == OWNER_BYTES
