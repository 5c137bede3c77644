"""Continuous requests to a real `vllm serve`, from a fixed pool; each answer is known beforehand."""

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from random import Random

from chaos.campaign.record import Outcome, Request
from e2e.kit import CHUNK_TOKENS, Engine, Said
from e2e.serving import Serving, Stream

PROMPTS = 120
FAVOURITES = 8  # asked for as often as all the others: after a loss of all chunks there are soon hits again
CHUNKS_MAX = 7
SHARING = 0.4  # the share of prompts that begin as an earlier one does
ANSWER_TOKENS = (8, 8, 8, 64)
LEAVING = 0.05  # the share of clients that hang up early
LEAVE_AFTER_S = (0.0, 0.4)
CLIENTS_MAX = 100
BATCH = 10  # of the reference run


def prompts(random: Random) -> list[list[int]]:
    """Their lengths lie around the chunks' borders."""
    lengths = [
        chunks * CHUNK_TOKENS + more
        for chunks in range(1, CHUNKS_MAX)
        for more in (-1, 0, 1, CHUNK_TOKENS // 2)
    ]
    made: list[list[int]] = []
    for _ in range(PROMPTS):
        tokens = [random.randrange(3, 1_000) for _ in range(random.choice(lengths))]
        if made and random.random() < SHARING:
            begun = random.choice(made)
            shared = random.randint(1, CHUNKS_MAX) * CHUNK_TOKENS
            tokens = begun[:shared] + tokens[len(begun[:shared]) :]
        made.append(tokens)
    return made


def references(engine: Engine, asked: Sequence[list[int]]) -> list[Said]:
    """What an engine without a cache says; a shorter answer is the beginning of the longest."""
    said: list[Said] = []
    for at in range(0, len(asked), BATCH):
        said += engine.ask(*asked[at : at + BATCH], tokens=max(ANSWER_TOKENS)).said
    return said


@dataclass
class Asked:
    prompt: int
    tokens: int
    leave_after_s: float | None
    began_s: float
    stream: Stream | None = None
    error: str = ""

    @property
    def hit(self) -> bool:
        return self.stream is not None and self.stream.cached > 0

    @property
    def is_over(self) -> bool:
        return self.stream is not None or bool(self.error)


class Load:
    """A request every `pace_s` seconds, whatever has become of the earlier ones."""

    def __init__(self, serving: Serving, pool: Sequence[list[int]], random: Random, pace_s: float) -> None:
        self.asked: list[Asked] = []
        self._serving = serving
        self._pool = pool
        self._random = random
        self._pace_s = pace_s
        self._ended = threading.Event()
        self._clients = ThreadPoolExecutor(CLIENTS_MAX)
        self._thread = threading.Thread(target=self._send)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.end()
        self._clients.shutdown()

    def end(self) -> None:
        """No new ones."""
        self._ended.set()
        self._thread.join()

    def _send(self) -> None:
        due_s = time.monotonic()
        while not self._ended.wait(max(0.0, due_s - time.monotonic())):
            self.asked.append(self._next())
            self._clients.submit(self._ask, self.asked[-1])
            due_s += self._pace_s

    def _next(self) -> Asked:
        random = self._random
        among = FAVOURITES if random.random() < 0.5 else len(self._pool)
        leave_after_s = random.uniform(*LEAVE_AFTER_S) if random.random() < LEAVING else None
        return Asked(random.randrange(among), random.choice(ANSWER_TOKENS), leave_after_s, time.monotonic())

    def _ask(self, one: Asked) -> None:
        try:
            one.began_s = time.monotonic()
            one.stream = self._serving.stream(self._pool[one.prompt], one.tokens, one.leave_after_s)
        except (OSError, HTTPException, ValueError, AssertionError) as error:
            one.error = f"{type(error).__name__}: {error}"


def judged(one: Asked, prompt: list[int], right: Said, since_s: float, now_s: float) -> Request:
    stream = one.stream or Stream(took_s=now_s - one.began_s)
    right_tokens, right_logprobs = (each[: len(stream.tokens)] for each in right)
    is_whole = stream.reason == "length" and len(stream.tokens) == one.tokens
    error = one.error or ("" if one.is_over else "no answer")
    if error or not (is_whole or one.leave_after_s is not None):
        outcome = Outcome.FAILED
    elif stream.tokens != right_tokens:
        outcome = Outcome.WRONG
    else:
        outcome = Outcome.RIGHT if is_whole else Outcome.LEFT
    return Request(
        at_s=one.began_s - since_s,
        took_s=stream.took_s,
        first_token_s=stream.first_token_s,
        prompt_tokens=len(prompt),
        answer_tokens=one.tokens,
        cached_tokens=stream.cached,
        outcome=outcome,
        same_logprobs=stream.logprobs == right_logprobs,
        error=error or ("" if outcome is not Outcome.FAILED else "the stream broke off"),
    )
