"""The load: one request at a time, document after document, over and over.

A thread of its own, so that the server can die while a request runs; what it sees it posts to a queue.
"""

import hashlib
import http.client
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

import msgspec

from lmconnector.demo.stream import Answer, StreamError
from lmconnector.demo.timeline import Request

MODEL = "tiny"
PACE_S = 0.6  # between the beginnings of two requests, or as long as one takes
REQUEST_DEADLINE_S = 120.0
JSON = {"Content-Type": "application/json"}
FIRST_TOKEN, TOKENS = 3, 997  # the model's, without its special ones


@dataclass(frozen=True)
class Asked:
    document: int


def words(name: str, count: int) -> list[int]:
    """Tokens that look like chance, and are the same in every run."""
    stream = hashlib.shake_128(name.encode()).digest(2 * count)
    return [FIRST_TOKEN + int.from_bytes(stream[at : at + 2]) % TOKENS for at in range(0, 2 * count, 2)]


class Load:
    def __init__(
        self,
        port: int,
        prompts: list[list[int]],
        answer_tokens: int,
        post: Callable[[Asked | Request], None],
        clock: Callable[[], float],
    ) -> None:
        self._port = port
        self._prompts = prompts
        self._answer_tokens = answer_tokens
        self._post = post
        self._clock = clock
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="demo-load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """After the request that runs."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(REQUEST_DEADLINE_S)

    def _loop(self) -> None:
        number = 0
        while not self._stopping.is_set():
            document = number % len(self._prompts)
            self._post(Asked(document))
            request = ask(self._port, document, self._prompts[document], self._answer_tokens, self._clock)
            self._post(request)
            number += 1
            self._stopping.wait(max(0.0, request.start_s + PACE_S - self._clock()))


def ask(
    port: int, document: int, prompt: list[int], answer_tokens: int, clock: Callable[[], float]
) -> Request:
    body = {
        "model": MODEL,
        "prompt": prompt,
        "max_tokens": answer_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    start_s = clock()
    try:
        answer = _stream(port, msgspec.json.encode(body), clock)
        answer.check_whole(answer_tokens)
    except (OSError, http.client.HTTPException, StreamError) as error:
        return Request(document=document, start_s=start_s, end_s=clock(), error=str(error) or repr(error))
    return Request(
        document=document,
        start_s=start_s,
        end_s=clock(),
        ttft_ms=1_000 * ((answer.first_s or 0.0) - start_s),
        prompt_tokens=answer.prompt_tokens,
        cached_tokens=answer.cached_tokens,
        tokens=tuple(answer.tokens),
    )


def _stream(port: int, body: bytes, clock: Callable[[], float]) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REQUEST_DEADLINE_S)
    try:
        connection.request("POST", "/v1/completions", body, JSON)
        response = connection.getresponse()
        if response.status != HTTPStatus.OK:
            raise StreamError(f"HTTP {response.status}: {response.read(500).decode(errors='replace')}")
        answer = Answer()
        for line in response:
            answer.feed(line, clock())
        return answer
    finally:
        connection.close()


def serves(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
