"""The packed slots of whole prefixes: right whatever is kept, bounded, and gone with their chunk."""

from dataclasses import dataclass
from typing import Self

from hypothesis import given
from hypothesis import strategies as st

from cache_server.trails import Trails


@dataclass(eq=False)
class Step:
    ref: bytes
    parent: Self | None = None
    trail: bytes = b""


def forest(parents: list[int]) -> list[Step]:
    """Each hangs on an earlier one, or on none."""
    steps: list[Step] = []
    for number, parent in enumerate(parents):
        steps.append(Step(bytes([number]), steps[parent % number] if number and parent >= 0 else None))
    return steps


def walked(step: Step) -> bytes:
    return (walked(step.parent) if step.parent else b"") + step.ref


@given(
    parents=st.lists(st.integers(-1, 20), min_size=1, max_size=20),
    asked=st.lists(st.integers(0, 100), max_size=30),
    bytes_max=st.integers(0, 40),
)
def test_a_trail_is_what_a_walk_finds_and_all_together_are_bounded(
    parents: list[int], asked: list[int], bytes_max: int
) -> None:
    steps, trails = forest(parents), Trails(bytes_max)
    for number in asked:
        step = steps[number % len(steps)]
        if number % 3:
            assert trails.to(step) == walked(step)
        else:
            trails.drop(step)
            assert not step.trail
        assert trails.bytes == sum(len(each.trail) for each in steps) <= bytes_max


def test_those_used_last_are_kept() -> None:
    first, second, third = (Step(bytes([number])) for number in range(3))
    trails: Trails[Step] = Trails(bytes_max=2)
    for step in (first, second, first, third):
        trails.to(step)
    assert [bool(step.trail) for step in (first, second, third)] == [True, False, True]
