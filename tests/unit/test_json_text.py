"""Whatever a file holds, it is the value that was expected, or none."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_server.holds import Hold
from cache_server.json_text import decoded

HOLDS = tuple[Hold, ...]
SPOILED = {
    "empty": b"",
    "no JSON": b"nonsense",
    "cut off": b'[{"owner": "a", "rea',
    "another kind": b'[{"owner": 1}]',
    "a field missing": b'[{"owner": "a"}]',
    "no UTF-8": b"\xff" * 100,
    "no UTF-8 within a text": b'[{"owner": "\xff", "reason": "r", "until_ms": 5}]',
    "half a character": rb'[{"owner": "\ud800", "reason": "r", "until_ms": 5}]',
    "too deep": b'[{"unknown": ' + b"[" * 100_000,
    "too large a number": b'[{"owner": "a", "reason": "r", "until_ms": ' + b"9" * 5_000 + b"}]",
}


def test_what_was_expected_is_read() -> None:
    holds = (Hold("a", "r", 5), Hold("ä", "", -1))
    assert decoded(msgspec.json.encode(holds), HOLDS) == holds


@pytest.mark.parametrize("text", SPOILED.values(), ids=SPOILED.keys())
def test_what_is_spoiled_is_nothing(text: bytes) -> None:
    assert decoded(text, HOLDS) is None


@given(st.binary(), st.binary())
def test_any_bytes_are_a_value_or_nothing(before: bytes, within: bytes) -> None:
    for text in (before, b'[{"owner": "' + within + b'", "reason": "r", "until_ms": 5}]'):
        holds = decoded(text, HOLDS)
        assert holds is None or all(isinstance(each, Hold) for each in holds)
