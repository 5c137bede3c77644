"""Any bytes in: a message or a `ProtocolError`, in bounded time and memory."""

import tracemalloc
from random import Random

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cache_server.protocol import codec
from cache_server.protocol import messages as m
from cache_server.protocol.codec import DETAIL_MAX, ProtocolError, check_shape, decode_reply, decode_request
from cache_server.protocol.messages import DEPTH_MAX, ITEMS_MAX, MESSAGE_BYTES_MAX, Code
from contract.frames import STRANGE_VALUES, breed, hostile_frames
from contract.samples import REPLIES, REQUESTS

GOOD_REQUESTS = [codec.encode(message) for message in REQUESTS]
GOOD_REPLIES = [codec.encode(message) for message in REPLIES]
WIRE_CODES = {Code.MALFORMED, Code.TOO_LARGE, Code.UNKNOWN_OP}
HOSTILE = hostile_frames()
TOO_LARGE = {
    "an array of 2**32 - 1", "an array of 2**32 - 1, some of them there", "a map of 2**32 - 1",
    "a map of 2**32 - 1, some of them there", "a huge map within a map", "just too many values",
    "too many values on two levels", "too many empty maps", "deep arrays", "deeper arrays", "deep maps",
    "too many bytes",
}  # fmt: skip
UNKNOWN_OP = {name for name in HOSTILE if name.startswith(("an op ", "a map without op"))}
DAMAGED = settings(max_examples=1_000, deadline=None)


def expected_code(name: str) -> str:
    if name in TOO_LARGE:
        return Code.TOO_LARGE
    return Code.UNKNOWN_OP if name in UNKNOWN_OP else Code.MALFORMED


def decoded(decode, data: bytes):
    """-> the message, or why there is none"""
    try:
        return decode(data)
    except ProtocolError as error:
        return error


def decodes_or_refuses(data: bytes) -> None:
    for decode, base in ((decode_request, m.Request), (decode_reply, m.Reply)):
        result = decoded(decode, data)
        if isinstance(result, ProtocolError):
            assert result.code in WIRE_CODES
            assert 0 <= result.id <= m.ID_MAX
            assert len(result.detail) <= DETAIL_MAX
        else:
            assert isinstance(result, base)
            assert decode(codec.encode(result)) == result


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_frame_gets_its_code(name: str):
    with pytest.raises(ProtocolError) as caught:
        decode_request(HOSTILE[name])
    assert caught.value.code == expected_code(name)
    assert len(caught.value.detail) <= DETAIL_MAX


@pytest.mark.parametrize("name", sorted(UNKNOWN_OP | {"a choice as long as can be"}))
def test_a_refusal_carries_the_id_where_it_can_be_read(name: str):
    with pytest.raises(ProtocolError) as caught:
        decode_request(HOSTILE[name])
    assert caught.value.id == 1


@given(st.binary(max_size=300))
@example(b"")
@DAMAGED
def test_random_bytes(data: bytes):
    decodes_or_refuses(data)


@given(st.integers(0, 2**64))
@DAMAGED
def test_damaged_messages(seed: int):
    random = Random(seed)
    for good in (GOOD_REQUESTS, GOOD_REPLIES):
        decodes_or_refuses(breed(random, good))


plain = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=9), inner, max_size=6),
    max_leaves=40,
)
field_names = st.sampled_from(
    sorted({name for message in (*REQUESTS, *REPLIES) for name in message.__struct_fields__})
)
ops = st.sampled_from(sorted({*codec.REQUESTS, *codec.REPLIES}))
maps = st.builds(
    lambda fields, id_, op: {**fields, "id": id_, "op": op},
    st.dictionaries(field_names, values, max_size=8),
    st.integers(-1, 2**64 - 1),
    ops,
)


@given(values | maps)
@DAMAGED
def test_any_value_in_any_field(value: object):
    decodes_or_refuses(msgpack.packb(value))


def every_field() -> list[tuple[str, str]]:
    messages = [*((message, "request") for message in REQUESTS), *((message, "reply") for message in REPLIES)]
    return [(type(message).__name__, name) for message, _ in messages for name in message.__struct_fields__]


@pytest.mark.parametrize(("type_name", "field"), every_field())
def test_a_strange_value_in_a_field_is_taken_in_full_or_refused(type_name: str, field: str):
    """A value that is taken is in the message as it was sent."""
    sample = next(message for message in (*REQUESTS, *REPLIES) if type(message).__name__ == type_name)
    decode = decode_request if isinstance(sample, m.Request) else decode_reply
    refused = 0
    for value in STRANGE_VALUES:
        body = msgpack.unpackb(codec.encode(sample))
        body[field] = value
        result = decoded(decode, msgpack.packb(body))
        if isinstance(result, ProtocolError):
            refused += 1
            assert result.code == (Code.UNKNOWN_OP if field == "op" else Code.MALFORMED)
        else:
            assert as_sent(getattr(result, field)) == value or isinstance(value, dict)
    assert refused


def as_sent(value: object) -> object:
    """Tuples were arrays on the wire, which `msgpack` reads as lists."""
    return msgpack.unpackb(msgpack.packb(msgspec.to_builtins(value, builtin_types=(bytes,))))


@pytest.mark.parametrize(
    ("type_name", "path", "value"),
    [
        ("Register", ("rank",), 2),  # of world 2
        ("Register", ("world",), m.RANKS_MAX + 1),
        ("Register", ("features",), ["f"] * 65),
        ("Register", ("engine",), "e" * 129),
        ("Register", ("namespace",), b"n" * 65),
        ("Register", ("proof",), "a/b"),
        ("Register", ("proof",), "name\n"),
        ("Register", ("role",), "boss"),
        ("Register", ("phase",), "gone"),
        ("Register", ("layout", "part"), 2),  # of 2 parts
        ("Register", ("layout", "parts"), 0),
        ("Register", ("layout", "groups"), []),
        ("Register", ("layout", "groups"), [{"part_bytes": 1}] * (m.GROUPS_MAX + 1)),
        ("Register", ("layout", "groups", 0, "part_bytes"), 0),
        ("Register", ("layout", "groups", 0, "part_bytes"), 2**40 + 1),
        ("Register", ("layout", "groups", 0, "window"), 2**16),
        ("Register", ("layout", "layers", 0, "shape"), [1] * 9),
        ("Register", ("layout", "layers", 0, "strides"), [-1]),
        ("Register", ("layout", "layers", 0, "dtype"), ""),
        ("Lookup", ("hashes",), bytes(31)),
        ("Lookup", ("hashes",), bytes(32 * (m.CHUNKS_MAX + 1))),
        ("Lookup", ("request",), "r" * 257),
        ("Lookup", ("epoch",), 2**48 + 1),
        ("Release", ("requests",), ["r"] * (m.CHUNKS_MAX + 1)),
        ("Release", ("requests",), [""]),
        ("Reserve", ("count",), 0),
        ("Reserve", ("count",), m.CHUNKS_MAX + 1),
        ("Reserve", ("group",), m.GROUPS_MAX),
        ("Commit", ("slots",), bytes(12)),  # for two hashes
        ("Commit", ("slots",), bytes(25)),
        ("Commit", ("parent",), bytes(31)),
        ("Commit", ("hashes",), bytes(33)),
        ("Abort", ("slots",), bytes(11)),
        ("Abort", ("slots",), bytes(12 * (m.CHUNKS_MAX + 1))),
        ("Clear", ("token",), "t" * 513),
        ("Registered", ("arena", "file_bytes"), -1),
        ("Found", ("chunks",), 3),  # the slots end with chunk 2
        ("Found", ("groups",), []),
        ("Found", ("groups", 0, "slots"), bytes(19)),
        ("Found", ("part_offsets",), [[0]]),
        ("Reserved", ("slots",), bytes(21)),
        ("Reserved", ("part_offsets",), [-1]),
        ("Committed", ("outcomes",), bytes(m.CHUNKS_MAX + 1)),
    ],
)
def test_a_field_out_of_bounds_is_refused(type_name: str, path: tuple, value: object):
    sample = next(message for message in (*REQUESTS, *REPLIES) if type(message).__name__ == type_name)
    body = msgpack.unpackb(codec.encode(sample))
    inner = body
    for step in path[:-1]:
        inner = inner[step]
    assert inner[path[-1]] != value
    inner[path[-1]] = value
    with pytest.raises(ProtocolError) as caught:
        (decode_request if isinstance(sample, m.Request) else decode_reply)(msgpack.packb(body))
    assert (caught.value.code, caught.value.id) == (Code.MALFORMED, sample.id)


def numbers_in(value: object, path: tuple = ()) -> list[tuple]:
    """The paths of all integers."""
    if type(value) is int:
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for step, inner in items for found in numbers_in(inner, (*path, step))]


@pytest.mark.parametrize("sample", [*REQUESTS, *REPLIES], ids=lambda sample: type(sample).__name__)
@pytest.mark.parametrize("wrong", [-1, 2**64 - 1, 1.0, True, None, "1"])
def test_every_number_is_a_bounded_integer(sample: m.Request | m.Reply, wrong: object):
    for path in numbers_in(msgpack.unpackb(codec.encode(sample))):
        if path[0] == "status":
            continue  # free in form
        body = msgpack.unpackb(codec.encode(sample))
        inner = body
        for step in path[:-1]:
            inner = inner[step]
        inner[path[-1]] = wrong
        with pytest.raises(ProtocolError) as caught:
            (decode_request if isinstance(sample, m.Request) else decode_reply)(msgpack.packb(body))
        assert caught.value.code == Code.MALFORMED
        assert type(caught.value.id) is int


@pytest.mark.parametrize("name", HOSTILE)
def test_memory_for_a_hostile_frame_is_bounded(name: str):
    frame = HOSTILE[name]
    items = min(len(frame), ITEMS_MAX)
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            decode_request(frame)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes <= 10 * len(frame) + 300 * items + (64 << 10)
    announced = (b"\xdb", b"\xc6", b"\xdd", b"\xdf")
    if frame.startswith(announced) or len(frame) > MESSAGE_BYTES_MAX:
        assert peak_bytes <= 64 << 10, "refused from its header alone"


def test_the_reply_to_the_largest_lookup_can_be_read():
    slots = bytes(20 * m.CHUNKS_MAX)
    reply = m.Found(
        id=m.ID_MAX,
        boot=m.ID_MAX,
        chunks=m.CHUNKS_MAX,
        groups=(m.Part(0, slots),) * m.GROUPS_MAX,
        part_offsets=((2**48,) * m.RANKS_MAX,) * m.GROUPS_MAX,
        lease_ms=2**48,
    )
    assert len(codec.encode(reply)) <= MESSAGE_BYTES_MAX
    assert decode_reply(codec.encode(reply)) == reply


@pytest.mark.parametrize(
    "status",
    [{"text": "x" * m.REPLY_BYTES_MAX}, {"rows": [0] * m.REPLY_ITEMS_MAX}],
    ids=["bytes", "values"],
)
def test_a_reply_has_its_own_limits(status: dict):
    with pytest.raises(ProtocolError) as caught:
        decode_reply(codec.encode(m.StatusReply(id=1, boot=1, status=status)))
    assert caught.value.code == Code.TOO_LARGE
    (value,) = status.values()
    half = {name: value[: len(value) // 2] for name in status}
    assert decode_reply(codec.encode(m.StatusReply(id=1, boot=1, status=half))).status == half
    assert m.REPLY_BYTES_MAX <= m.FRAME_BYTES_MAX


def test_the_largest_registration_can_be_read():
    layer = m.Layer("n" * 128, (2**48,) * 8, (2**48,) * 8, "d" * 128)
    group = m.Group(2**40, 2**16 - 1, tuple(range(m.LAYERS_MAX // m.GROUPS_MAX)))
    layout = m.Layout(groups=(group,) * m.GROUPS_MAX, layers=(layer,) * m.LAYERS_MAX)
    request = m.Register(
        id=1,
        version_min=1,
        version_max=1,
        engine="e",
        role="worker",
        namespace=b"n",
        proof="p",
        features=("f" * 128,) * 64,
        layout=layout,
    )
    assert decode_request(codec.encode(request)) == request


def test_a_message_one_byte_too_long_is_refused():
    body = {"op": "ping", "id": 1, "unknown": ""}
    spare = MESSAGE_BYTES_MAX - len(msgpack.packb({**body, "unknown": "x" * 70_000})) + 70_000
    assert decode_request(msgpack.packb({**body, "unknown": "x" * spare})) == m.Ping(id=1)
    with pytest.raises(ProtocolError) as caught:
        decode_request(msgpack.packb({**body, "unknown": "x" * (spare + 1)}))
    assert caught.value.code == Code.TOO_LARGE


# ---- check_shape against msgpack, which walks the same bytes in its own way ----


def count_values(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(1 + count_values(inner) for inner in value.values())
    return 1 + sum(map(count_values, value)) if isinstance(value, list) else 1


def depth_of(value: object) -> int:
    """Containers that hold something, one in the other."""
    inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    return 1 + max(map(depth_of, inner)) if inner else 0


deep_values = st.recursive(
    plain | st.text(min_size=30, max_size=300) | st.binary(min_size=250, max_size=300),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(st.none(), min_size=14, max_size=20)
        | st.dictionaries(st.text(max_size=40), inner, max_size=3)
        | st.dictionaries(st.integers(0, 2**20).map(str), st.none(), min_size=14, max_size=18)
    ),
    max_leaves=30,
)


@given(deep_values, st.booleans())
@DAMAGED
def test_the_shape_of_any_packed_value_is_checked_right(value: object, bin_type: bool):
    packed = msgpack.packb(value, use_bin_type=bin_type)
    if depth_of(value) <= DEPTH_MAX:
        check_shape(packed)
    else:
        with pytest.raises(ProtocolError, match="nested deeper"):
            check_shape(packed)


@pytest.mark.parametrize(
    "value",
    [
        [0] * (ITEMS_MAX - 1),
        [0] * ITEMS_MAX,
        [[0] * 9] * ((ITEMS_MAX - 1) // 10),
        [[0] * 9] * (ITEMS_MAX // 10 + 1),
        [0] * 65_536,
        {str(number): 0 for number in range(ITEMS_MAX // 2 - 1)},
        {str(number): 0 for number in range(65_536)},
        "x" * 70_000,
    ],
    ids=lambda value: f"{type(value).__name__} of {len(value)}",
)
def test_the_shape_of_a_long_value(value: object):
    packed = msgpack.packb(value)
    if count_values(value) <= ITEMS_MAX:
        check_shape(packed)
    else:
        with pytest.raises(ProtocolError, match="more than"):
            check_shape(packed)


def whole_value(data: bytes) -> bool:
    """Whether `data` is exactly one value, as msgpack sees it."""
    unpacker = msgpack.Unpacker(max_buffer_size=1 << 20)
    unpacker.feed(data)
    try:
        unpacker.skip()
    except (msgpack.OutOfData, ValueError):
        return False
    return unpacker.tell() == len(data)


heads = st.integers(0, 255).map(lambda byte: bytes([byte]))
headed = st.lists(heads | st.binary(max_size=3) | st.just(b"\0"), max_size=12).map(b"".join)


@given(headed)
@settings(max_examples=3_000, deadline=None)
def test_bytes_pass_only_if_they_are_one_whole_value(data: bytes):
    try:
        check_shape(data)
    except ProtocolError:
        return
    assert whole_value(data)


def one_value_of(first: int) -> bytes | None:
    """The shortest value that begins with this byte and contains something, by the specification."""
    sizes = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4, 0xDC: 2, 0xDD: 4, 0xDE: 2, 0xDF: 4}
    plain_sizes = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
    plain_sizes |= {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
    head = bytes([first])
    if first in sizes:
        content = b"\x01\x02\x01\x02" if first >= 0xDE else b"\x01\x02"
        return head + (2).to_bytes(sizes[first]) + content
    if first in plain_sizes:
        return head + bytes(plain_sizes[first])
    if first < 0x80 or first >= 0xE0:
        return head
    if first < 0x90:
        return head + b"\x01\x02" * (first & 15)
    if first < 0xA0:
        return head + b"\x01" * (first & 15)
    return head + b"a" * (first & 31) if first < 0xC0 else None


@pytest.mark.parametrize("first", range(256))
def test_the_arithmetic_of_every_first_byte(first: int):
    value = one_value_of(first)
    if value is None:
        with pytest.raises(ProtocolError, match="extension types are not used"):
            check_shape(bytes([first]) + bytes(20))
        return
    assert whole_value(value)
    check_shape(value)
    check_shape(b"\x92" + value + b"\x00")  # what comes behind it is found
    with pytest.raises(ProtocolError, match="ends at byte"):
        check_shape(value + b"\x00")
    for length in range(len(value)):
        with pytest.raises(ProtocolError):
            check_shape(value[:length])
