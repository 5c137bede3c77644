"""A streamed answer is put together whole, or refused with the reason."""

import pytest

from lmconnector.demo.stream import Answer, StreamError

ROLE = b'data: {"id":"x","choices":[{"index":0,"text":"","prompt_token_ids":[1,2],"token_ids":[]}]}\n'
FIRST = b'data: {"id":"x","choices":[{"index":0,"text":"a","token_ids":[11,12]}],"usage":null}\n'
SECOND = b'data: {"id":"x","choices":[{"index":0,"text":"b","token_ids":[13],"finish_reason":"length"}]}\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":9,"prompt_tokens_details":{"cached_tokens":8}}}\n'
END = b"data: [DONE]\n"


def fed(*lines: bytes) -> Answer:
    answer = Answer()
    for at_s, line in enumerate(lines):
        answer.feed(line, float(at_s))
    return answer


def test_an_answer_is_put_together() -> None:
    answer = fed(b": a comment\n", ROLE, b"\n", FIRST, b"\n", SECOND, USAGE, END)
    answer.check_whole(3)
    assert answer.tokens == [11, 12, 13]
    assert answer.first_s == 3.0, "the first token, not the first piece"
    assert (answer.prompt_tokens, answer.cached_tokens) == (9, 8)


@pytest.mark.parametrize("details", [b"null", b"{}", b'{"cached_tokens":null}'])
def test_no_word_of_the_cache_is_no_hit(details: bytes) -> None:
    usage = b'data: {"usage":{"prompt_tokens":9,"prompt_tokens_details":' + details + b"}}\n"
    assert fed(FIRST, usage, END).cached_tokens == 0


@pytest.mark.parametrize(
    "lines", [(), (END,), (FIRST,), (FIRST, SECOND), (FIRST, END), (FIRST, SECOND, SECOND, END)]
)
def test_an_answer_that_broke_off_is_refused(lines: tuple[bytes, ...]) -> None:
    with pytest.raises(StreamError, match="broke off after"):
        fed(*lines).check_whole(3)


def test_an_error_in_the_stream_is_told() -> None:
    with pytest.raises(StreamError, match="EngineDeadError"):
        fed(FIRST, b'data: {"error":{"message":"EngineDeadError","code":500}}\n')


def test_nonsense_is_shown() -> None:
    with pytest.raises(StreamError, match="half a pie"):
        fed(b"data: half a pie\n")
