"""The verbs that ask a server, when a peer answers that is none, or one of another version."""

import msgspec
import pytest

from cache_server import tools
from cache_server.config import gather, parse
from cache_server.deep import do_job
from cache_server.protocol import messages as m
from cache_server.protocol.codec import encode
from peer import Answer, peer

STRANGE: dict[str, Answer] = {
    "no message": lambda _: b"HTTP/1.1 400 Bad Request",
    "nothing": lambda _: b"",
    "a message of tomorrow": lambda request: msgspec.msgpack.encode({"op": "pong2", "id": request.id}),
    "another's answer": lambda request: encode(m.Committed(id=request.id, boot=1, outcomes=b"")),
    "a status of other fields": lambda request: encode(m.StatusReply(id=request.id, boot=1, status={"x": 1})),
}


@pytest.mark.parametrize("answer", STRANGE.values(), ids=STRANGE.keys())
@pytest.mark.parametrize("verb", ["status", "workers", "ping", "clear", "top"])
def test_an_answer_that_is_not_understood_is_told_with_where_it_came_from(
    verb: str, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    with peer(answer) as directory:
        assert tools.run(verb, directory, as_json=False) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"cache-server: the server on {directory} is not understood by version ")
    assert "ask with the cache-server that runs it" in said


@pytest.mark.parametrize("answer", STRANGE.values(), ids=STRANGE.keys())
def test_a_deep_check_fails_on_it(answer: Answer) -> None:
    with peer(answer) as directory:
        failed, words = do_job(parse(gather({"dir": str(directory)}, {}, None)))
    assert failed
    assert words.startswith("failed at connect: ")
