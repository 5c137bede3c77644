"""Fills a server with committed chunks of 4 KiB, as an engine with long prompts would."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

from cache_server.client import RefusedError
from cache_server.protocol import messages as m
from cache_server.protocol.keys import HASH_BYTES, Hashes, SlotRef
from cache_server.protocol.messages import Code, Outcome
from cache_server.session import Session

CHUNK_BYTES = 4096
CHAIN_CHUNKS = 512
CHAINS_PER_RESERVE = 4
BUSY_RETRY_S = 0.002
BUSY_DEADLINE_S = 120.0


class Filler:
    """An engine that stores prompts of 512 chunks each.  It leaves their contents unwritten: the server never
    reads them."""

    def __init__(self, runtime_dir: Path, seed: int = 1) -> None:
        self.session = Session(runtime_dir, f"bench-{seed}", CHUNK_BYTES)
        self.session.client.timeout_ms = 20_000
        self.prompts: list[bytes] = []  # the hashes of each, packed
        self._random = random.Random(seed)

    @property
    def chunks(self) -> int:
        return len(self.prompts) * CHAIN_CHUNKS

    def clear(self) -> None:
        client = self.session.client
        client.ask(m.Clear(id=client.next_id(), session=self.session.session), m.Done)
        self.prompts = []

    def new_hashes(self, count: int) -> bytes:
        return self._random.randbytes(HASH_BYTES * count)

    def fill(self, chunks: int) -> None:
        """Until at least so many are stored."""
        while self.chunks < chunks:
            slots = self.reserve(CHAIN_CHUNKS * CHAINS_PER_RESERVE)
            for first in range(0, len(slots), CHAIN_CHUNKS):
                prompt = self.new_hashes(CHAIN_CHUNKS)
                self.commit(prompt, slots[first : first + CHAIN_CHUNKS])
                self.prompts.append(prompt)

    def reserve(self, count: int) -> list[SlotRef]:
        end_s = time.perf_counter() + BUSY_DEADLINE_S
        while True:
            try:
                return self.session.reserve(count)
            except RefusedError as refusal:
                if refusal.code != Code.BUSY or time.perf_counter() > end_s:
                    raise
            time.sleep(BUSY_RETRY_S)

    def commit(self, hashes: bytes, slots: Sequence[SlotRef]) -> None:
        outcomes = self.session.commit(Hashes(hashes), slots)
        assert outcomes == bytes([Outcome.STORED]) * len(slots), "every chunk is new"

    def lookup(self, hashes: bytes, name: str = "bench") -> m.Lookup:
        return m.Lookup(id=1, session=self.session.session, request=name, hashes=hashes)
