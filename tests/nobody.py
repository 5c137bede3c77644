"""Tests that look at files as a user who may not."""

import contextlib
import os
from collections.abc import Iterator

import pytest

NOBODY = 65_534
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@contextlib.contextmanager
def somebody_else() -> Iterator[None]:
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
