"""Old and new talk to each other: unknown fields, absent fields, version windows, features."""

import msgpack
import msgspec
import pytest

from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError, decode_reply, decode_request, encode
from contract.pair import Pair, WiredPeer
from contract.samples import BOOT, HASHES, REPLIES, REQUESTS, SESSION

SAMPLES = {type(message).__name__: message for message in (*REQUESTS, *REPLIES)}
LEAST: dict[str, dict[str, object]] = {
    "Register": {
        "version_min": 1,
        "version_max": 1,
        "engine": "e",
        "role": "worker",
        "namespace": b"n",
        "proof": "p",
    },
    "Unregister": {"session": SESSION},
    "Ping": {},
    "Lookup": {"session": SESSION, "request": "r", "hashes": HASHES[0]},
    "Release": {"session": SESSION, "requests": ["r"]},
    "Reserve": {"session": SESSION, "count": 1},
    "Commit": {"session": SESSION, "hashes": HASHES[0], "slots": bytes(12)},
    "Abort": {"session": SESSION, "slots": bytes(12)},
    "Clear": {},
    "Status": {},
    "Registered": {
        "version": 1,
        "features": [],
        "session": SESSION,
        "arena": {"path": "p", "id": b"i", "version": 1, "file_bytes": 2, "capacity_bytes": 1},
        "lease_ms": 1,
        "silent_after_ms": 1,
    },
    "Done": {},
    "Pong": {"seq": 0, "known": False, "state": "ready", "progress": 0, "silence_ms": 0},
    "Found": {"chunks": 0},
    "Reserved": {"slots": b"", "slot_bytes": 4096, "part_offsets": [0]},
    "Committed": {"outcomes": b"\0"},
    "StatusReply": {},
    "Refused": {"code": "LATER", "detail": ""},
}


def read(name: str, body: object) -> m.Request | m.Reply:
    data = msgpack.packb(body)
    return decode_request(data) if isinstance(SAMPLES[name], m.Request) else decode_reply(data)


def least_body(name: str) -> dict[str, object]:
    envelope = {"op": SAMPLES[name].__struct_config__.tag, "id": 5}
    boot = {"boot": BOOT} if isinstance(SAMPLES[name], m.Reply) else {}
    return {**envelope, **boot, **LEAST[name]}


def with_unknown_fields(value: object) -> object:
    """In every map of the message."""
    if isinstance(value, list):
        return [with_unknown_fields(item) for item in value]
    if not isinstance(value, dict):
        return value
    news = {"later": [1, {"a": b"b"}, None], "zz": {"deep": {"deeper": 1.5}}}
    return {"a_new_field": True, **{key: with_unknown_fields(item) for key, item in value.items()}, **news}


@pytest.mark.parametrize("name", SAMPLES)
def test_unknown_fields_are_ignored_at_every_depth(name: str):
    body = with_unknown_fields(msgpack.unpackb(encode(SAMPLES[name])))
    message = read(name, body)
    if name == "StatusReply":  # free in form: what is new in it arrives
        assert message.status["state"] == "ready"
    else:
        assert message == SAMPLES[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_order_of_fields_means_nothing(name: str):
    body = msgpack.unpackb(encode(SAMPLES[name]))
    assert read(name, dict(reversed(body.items()))) == SAMPLES[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_fields_with_a_default_may_be_absent(name: str):
    body = least_body(name)
    message = read(name, body)
    values = [getattr(message, field) for field in type(message).__struct_fields__ if field not in body]
    assert len(values) == len(type(message).__struct_fields__) - len(body) + 1  # `op` is no field
    assert read(name, msgpack.unpackb(encode(message))) == message


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in SAMPLES for field in least_body(name)])
def test_every_other_field_is_wanted(name: str, field: str):
    body = least_body(name)
    del body[field]
    with pytest.raises(ProtocolError):
        read(name, body)


def test_a_code_of_a_later_server_is_read_as_a_refusal():
    assert read("Refused", least_body("Refused")).code == "LATER"


@pytest.mark.parametrize("window", [(1, 1), (0, 1), (1, 2), (0, 2**31), (m.VERSION_MAX, m.VERSION_MAX)])
def test_windows_that_overlap_settle_on_the_greatest_common_version(pair: Pair, window: tuple[int, int]):
    request = msgspec.structs.replace(
        WiredPeer(pair).registration, version_min=window[0], version_max=window[1]
    )
    assert pair.expect(request, m.Registered).version == min(window[1], m.VERSION_MAX)


def test_features_nobody_knows_are_not_granted(pair: Pair):
    request = msgspec.structs.replace(WiredPeer(pair).registration, features=("teleport", "telepathy"))
    assert pair.expect(request, m.Registered).features == ()
