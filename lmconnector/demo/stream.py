"""A streamed answer of vLLM's OpenAI server, put together line by line.  Pure."""

import msgspec
from msgspec import Struct

DATA = b"data: "
DONE = b"[DONE]"


class Choice(Struct):
    token_ids: list[int] | None = None


class Details(Struct):
    cached_tokens: int | None = None


class Usage(Struct):
    prompt_tokens: int = 0
    prompt_tokens_details: Details | None = None


class Piece(Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw | None = None


class StreamError(Exception):
    """The server said that it failed, or stopped in the middle."""


class Answer:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.first_s: float | None = None  # when the first token came
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self._done = False

    def feed(self, line: bytes, at_s: float) -> None:
        line = line.strip()
        if not line.startswith(DATA):
            return
        if line == DATA + DONE:
            self._done = True
            return
        try:
            piece = msgspec.json.decode(line[len(DATA) :], type=Piece)
        except msgspec.DecodeError as error:
            raise StreamError(f"not a piece of an answer: {error}: {line[:200]!r}") from error
        if piece.error is not None:
            raise StreamError(bytes(piece.error).decode())
        for choice in piece.choices:
            if choice.token_ids and self.first_s is None:
                self.first_s = at_s
            self.tokens += choice.token_ids or []
        if piece.usage is not None:
            details = piece.usage.prompt_tokens_details
            self.prompt_tokens = piece.usage.prompt_tokens
            self.cached_tokens = (details.cached_tokens if details else None) or 0

    def check_whole(self, tokens: int) -> None:
        if not self._done or len(self.tokens) != tokens or self.first_s is None:
            raise StreamError(f"the answer broke off after {len(self.tokens)} of {tokens} tokens")
