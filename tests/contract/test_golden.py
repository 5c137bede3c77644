"""The exact bytes of every message: a change here changes the protocol (PYTEST_REWRITE=1 accepts it)."""

import os
from pathlib import Path

import pytest

from cache_server.protocol import codec
from cache_server.protocol import messages as m
from contract.samples import REPLIES, REQUESTS

GOLDEN = Path(__file__).with_name("golden.txt")
SAMPLES = {type(message).__name__: message for message in (*REQUESTS, *REPLIES)}


def rewritten() -> dict[str, str]:
    if os.environ.get("PYTEST_REWRITE"):
        lines = [f"{name} {codec.encode(message).hex()}\n" for name, message in SAMPLES.items()]
        GOLDEN.write_text("".join(lines))
    return dict(line.split() for line in GOLDEN.read_text().splitlines())


BYTES = rewritten()


def decode(name: str, data: bytes) -> m.Request | m.Reply:
    is_request = isinstance(SAMPLES[name], m.Request)
    return codec.decode_request(data) if is_request else codec.decode_reply(data)


@pytest.mark.parametrize("name", SAMPLES)
def test_encodes_to_the_golden_bytes(name: str):
    assert codec.encode(SAMPLES[name]).hex() == BYTES[name]


@pytest.mark.parametrize("name", SAMPLES)
def test_the_golden_bytes_decode_to_the_message(name: str):
    assert decode(name, bytes.fromhex(BYTES[name])) == SAMPLES[name]


def test_every_message_type_has_golden_bytes():
    types = {cls.__name__ for cls in (*codec.REQUESTS.values(), *codec.REPLIES.values())}
    assert types == set(SAMPLES) == set(BYTES)


def test_the_codec_and_the_type_unions_know_the_same_messages():
    assert set(codec.REQUESTS.values()) == set(m.AnyRequest.__args__)
    assert set(codec.REPLIES.values()) == set(m.AnyReply.__args__)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample_sets_every_field_to_something_other_than_its_default(name: str):
    message = SAMPLES[name]
    fields = type(message).__struct_fields__
    defaults = dict(
        zip(reversed(fields), reversed(type(message).__struct_defaults__), strict=False)
    )  # those with a default come last
    same = [field for field in fields if field in defaults and getattr(message, field) == defaults[field]]
    assert not same


@pytest.mark.parametrize("name", [type(request).__name__ for request in REQUESTS])
def test_a_request_is_no_reply(name: str):
    with pytest.raises(codec.ProtocolError):
        codec.decode_reply(bytes.fromhex(BYTES[name]))


@pytest.mark.parametrize(
    "name", [type(reply).__name__ for reply in REPLIES if type(reply) is not m.StatusReply]
)
def test_a_reply_is_no_request(name: str):
    with pytest.raises(codec.ProtocolError):
        codec.decode_request(bytes.fromhex(BYTES[name]))
