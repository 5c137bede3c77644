"""The load against a real HTTP server: what is no whole answer counts as failed, with the reason."""

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import msgspec
import pytest

from lmconnector.demo.load import Asked, Load, ask, serves, words
from lmconnector.demo.timeline import Request

PIECE = b'data: {"choices":[{"token_ids":[%d]}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens":2}}}\n\n'
DONE = b"data: [DONE]\n\n"


class Engine(BaseHTTPRequestHandler):
    """Answers with what the test has laid out."""

    status: ClassVar[int] = 200
    pieces: ClassVar[list[bytes]] = []
    asked: ClassVar[list[dict[str, object]]] = []

    def do_POST(self) -> None:
        self.asked.append(msgspec.json.decode(self.rfile.read(int(self.headers["Content-Length"]))))
        self.do_GET()

    def do_GET(self) -> None:
        self.send_response(self.status)
        self.end_headers()
        for piece in self.pieces:
            self.wfile.write(piece)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def engine() -> Iterator[ThreadingHTTPServer]:
    Engine.status, Engine.pieces, Engine.asked = 200, [PIECE % 7, PIECE % 8, USAGE, DONE], []
    with ThreadingHTTPServer(("127.0.0.1", 0), Engine) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def asked(server: ThreadingHTTPServer) -> Request:
    return ask(server.server_port, 1, [4, 5, 6], 2, time.monotonic)


def test_an_answer_is_taken_with_its_figures(engine: ThreadingHTTPServer) -> None:
    request = asked(engine)
    assert (request.document, request.tokens, request.error) == (1, (7, 8), "")
    assert (request.prompt_tokens, request.cached_tokens) == (3, 2)
    assert 0 < request.ttft_ms <= 1_000 * (request.end_s - request.start_s)
    assert Engine.asked[0]["prompt"] == [4, 5, 6]
    assert (Engine.asked[0]["max_tokens"], Engine.asked[0]["temperature"]) == (2, 0)


def test_a_refusal_is_a_failure(engine: ThreadingHTTPServer) -> None:
    Engine.status, Engine.pieces = 500, [b"the engine is dead"]
    assert asked(engine).error == "HTTP 500: the engine is dead"
    assert not serves(engine.server_port)


def test_half_an_answer_is_a_failure(engine: ThreadingHTTPServer) -> None:
    Engine.pieces = [PIECE % 7]
    request = asked(engine)
    assert request.error == "the answer broke off after 1 of 2 tokens"
    assert request.tokens == ()


def test_nobody_there_is_a_failure(engine: ThreadingHTTPServer) -> None:
    assert serves(engine.server_port)
    engine.shutdown()
    engine.server_close()
    assert "refused" in asked(engine).error
    assert not serves(engine.server_port)


def test_the_load_asks_one_document_after_the_other_until_it_is_stopped(engine: ThreadingHTTPServer) -> None:
    enough = threading.Event()
    posted: list[Asked | Request] = []

    def post(event: Asked | Request) -> None:
        posted.append(event)
        if len(posted) == 4:
            enough.set()

    load = Load(engine.server_port, [[1], [2]], 2, post, time.monotonic)
    load.start()
    assert enough.wait(30)
    load.stop()
    before = len(posted)
    assert [type(event) for event in posted[:4]] == [Asked, Request] * 2
    assert [event.document for event in posted[:4]] == [0, 0, 1, 1]
    assert [request["prompt"] for request in Engine.asked[:2]] == [[1], [2]]
    assert len(posted) == before


def test_words_are_the_same_in_every_run_and_none_is_special() -> None:
    assert words("document 1", 500) == words("document 1", 500)
    assert words("document 1", 500) != words("document 2", 500)
    assert set(words("document 1", 5_000)) <= set(range(3, 1_000))
    assert len(words("document 1", 500)) == 500
