"""What a right engine computes: every token's KV bytes and the token that follows, from the tokens before."""

from collections.abc import Sequence
from hashlib import blake2b

CELL_BYTES = 8  # one token's KV of one group on one rank
VOCABULARY = 4  # of generated tokens: few, so that requests generate alike
WRONG = -1  # what is sampled from a KV cache that is not the tokens'
POISON = b"\xeeP0IS0N\xee"
MEMO_MAX = 200_000

_digests: dict[tuple[bytes, int], bytes] = {}
_cells: dict[tuple[bytes, int, int, int], bytes] = {}


def digest_after(before: bytes, token: int) -> bytes:
    """Stands for a whole prefix."""
    key = (before, token)
    digest = _digests.get(key)
    if digest is None:
        if len(_digests) > MEMO_MAX:
            _digests.clear()
        digest = _digests[key] = blake2b(b"%d" % token + before, digest_size=32).digest()
    return digest


def next_token(digest: bytes, weights: int) -> int:
    return 1_000 + (digest[0] + weights) % VOCABULARY


def cell(digest: bytes, weights: int, group: int, part: int) -> bytes:
    key = (digest, weights, group, part)
    found = _cells.get(key)
    if found is None:
        if len(_cells) > MEMO_MAX:
            _cells.clear()
        salt = b"%d %d %d " % (weights, group, part)
        found = _cells[key] = blake2b(salt + digest, digest_size=CELL_BYTES).digest()
    return found


class Prefix:
    """Tokens, and what they stand for; grows and shrinks at its end."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.digests: list[bytes] = []
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        digest = self.digests[-1] if self.digests else b""
        for token in tokens:
            digest = digest_after(digest, token)
            self.digests.append(digest)
        self.tokens += tokens

    def cut(self, length: int) -> None:
        del self.tokens[length:], self.digests[length:]

    def cells(self, begin: int, end: int, weights: int, group: int, part: int) -> bytes:
        return b"".join([cell(digest, weights, group, part) for digest in self.digests[begin:end]])
