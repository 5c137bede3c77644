"""docs/protocol.md says what the code does: fields, defaults, refusals, outcomes, limits, offsets."""

import re
import struct
import zlib
from itertools import cycle
from pathlib import Path

import msgspec
import pytest

from cache_server.config import Config, gather, parse
from cache_server.limits import Limits
from cache_server.protocol import codec, slots
from cache_server.protocol import messages as m
from cache_server.protocol.keys import SLOT_NAME_BYTES, SLOT_REF, SlotRef
from cache_server.server import REPLIES_WAITING_MAX

TEXT = (Path(__file__).parents[2] / "docs" / "protocol.md").read_text()
PARTS = (m.Layout, m.Group, m.Layer, m.Arena, m.Part)
TYPES = {cls.__name__: cls for cls in (*codec.REQUESTS.values(), *codec.REPLIES.values(), *PARTS)}
ENVELOPE = {"id", "boot"}
LINES_MAX = 250


def table(*head: str) -> list[list[str]]:
    """The rows of the table whose first columns have these names."""
    lines = TEXT.splitlines()
    start = next(at for at, line in enumerate(lines) if cells(line)[: len(head)] == list(head))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append(cells(line))
    return rows


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def documented_fields() -> dict[str, dict[str, str]]:
    """message -> field -> default, as written"""
    fields: dict[str, dict[str, str]] = {}
    for message, field_names, _, defaults, _ in table("message", "field"):
        (name,) = names(message)
        listed = fields.setdefault(name, {})
        for field, default in zip(names(field_names), cycle(defaults.split(", ")), strict=False):
            assert field not in listed, f"{name}.{field} twice"
            listed[field] = default
    return fields


def default_in_words(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    if value is None or value == ():
        return "none"
    return "empty" if value in ("", b"") else str(value)


def limits_in_code() -> dict[str, int]:
    limits = {field: getattr(Limits(), field) for field in Limits.__slots__}
    constants = {name: value for name, value in vars(m).items() if name.endswith("_MAX")}
    return {**limits, **constants, "REPLIES_WAITING_MAX": REPLIES_WAITING_MAX}


@pytest.mark.parametrize("name", TYPES)
def test_every_field_of_every_message(name: str):
    expected = {
        field.name: default_in_words(field)
        for field in msgspec.structs.fields(TYPES[name])
        if field.name not in ENVELOPE or name in ("Arena", "Part")
    }
    assert documented_fields()[name] == expected


def test_no_message_that_there_is_not():
    assert set(documented_fields()) == set(TYPES)


def test_every_op_with_its_reply():
    said = dict(re.findall(r"^- \*\*[A-Z]+\*\* \(`(\w+)` → `(\w+)`\)", TEXT, re.MULTILINE))
    assert set(said) == set(codec.REQUESTS)
    assert {*said.values(), "refused"} == set(codec.REPLIES)


def test_every_refusal_code_and_what_to_do_about_it():
    rows = table("code", "why")
    codes = [value for name, value in vars(m.Code).items() if name.isupper()]
    assert [names(row[0])[0] for row in rows] == codes
    assert all(all(row) and len(row) == 3 for row in rows)


def test_every_outcome():
    said = {names(name)[0]: int(value) for name, value, _ in table("outcome", "value")}
    assert said == {name: value for name, value in vars(m.Outcome).items() if name.isupper()}


def test_every_limit():
    code = limits_in_code()
    said = {names(name)[0]: int(value) for name, value, _ in table("limit", "value")}
    assert said == {name: code[name] for name in said}
    of_a_message = {name for name in vars(m) if name.endswith("_MAX")} - {"ID_MAX", "VERSION_MAX"}
    assert of_a_message <= set(said)


def test_the_operators_limits_and_their_defaults():
    said = {name: int(value) for name, value in re.findall(r"`(\w+_ms)` (\d+)", TEXT)}
    assert set(said) == {"lease_ms", "silent_after_ms", "reclaim_grace_ms"}
    assert said == {name: limits_in_code()[name] for name in said}
    config: Config = parse(gather({}, {}, None))
    assert f"{config.stock_percent} % of the arena" in TEXT
    assert f"all engines ({config.reserved_percent} %)" in TEXT


def test_bounds_of_fields_that_are_limits():
    assert f"parts ≤ {m.RANKS_MAX}" in TEXT
    assert f"world ≤ {m.RANKS_MAX}" in TEXT
    assert f"1 … {m.GROUPS_MAX} `Group`" in TEXT
    assert f"≤ {m.LAYERS_MAX} `Layer`" in TEXT
    assert f"1 … {m.CHUNKS_MAX}" in TEXT
    assert f"0 … {m.GROUPS_MAX - 1}" in TEXT


def test_the_version_this_page_is_of():
    assert m.VERSION_MIN == m.VERSION_MAX
    assert f"This page is version {m.VERSION_MAX}." in TEXT
    assert f"format version {slots.FORMAT_VERSION}" in TEXT


def test_packed_sizes():
    assert f"A *slot ref* is {SLOT_REF.size} bytes" in TEXT
    assert f"A *slot name* is {SLOT_NAME_BYTES} bytes" in TEXT
    assert SLOT_REF.pack(*SlotRef(1, 2, 3)) == struct.pack("<QQI", 1, 2, 3)


def test_the_offsets_of_an_entry():
    geometry = slots.Geometry.of(16 << 20)
    number = 513
    entry = slots.Entry(2, 3, 4, 5, 6, 7, 8, 9, b"o" * 16, b"p" * 16, b"h" * 32)
    file = memoryview(bytearray(geometry.data_at))
    slots.write_entry(file, geometry, number, entry)
    at = 8192 + -(-8 * geometry.slabs // 4096) * 4096 + 128 * number  # as the page has it
    raw = bytes(file[at : at + 128])
    end = 0
    for offset, size, what in table("offset", "bytes", "entry"):
        assert int(offset) == end, "the table has no gap"
        end = int(offset) + int(size)
        said = raw[int(offset) : end]
        name = what.split()[0].strip(":")
        if name in ("zero", "check"):
            check = zlib.crc32(raw[:124], number)
            assert int.from_bytes(said, "little") == (0 if name == "zero" else check)
        else:
            value = getattr(entry, name)
            assert said == value if isinstance(value, bytes) else int.from_bytes(said, "little") == value
    assert end == slots.ENTRY_BYTES


def test_the_offsets_of_the_header():
    geometry = slots.Geometry.of(16 << 20)
    file = memoryview(bytearray(geometry.data_at))
    slots.write_header(file, geometry, b"i" * 16)
    values = {
        "magic": int.from_bytes(b"LMCARENA", "little"),
        "format": slots.FORMAT_VERSION,
        "arena": int.from_bytes(b"i" * 16, "little"),
        "capacity": geometry.capacity_bytes,
        "slab": geometry.slab_bytes,
        "CRC-32": zlib.crc32(bytes(file[:48])),
    }
    rows = table("offset", "bytes", "header")
    said = {
        what.split()[0]: int.from_bytes(file[int(offset) : int(offset) + int(size)], "little")
        for offset, size, what in rows
    }
    assert said == values
    assert (slots.BOOTS_AT, slots.SLABS_AT, slots.HISTORY) == (4096, 8192, 16)


def test_the_page_is_short():
    assert len(TEXT.splitlines()) <= LINES_MAX
