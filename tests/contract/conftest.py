"""A service in memory, and everything that is said to it goes over the wire's bytes."""

import pytest

from contract.pair import Pair
from kit import World


@pytest.fixture
def pair() -> Pair:
    return Pair(World())
