"""The one clock that decisions are made by: it never jumps."""

import time


def monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000
