"""Each request of a campaign is judged by what the reference run said."""

from random import Random

import pytest

from chaos.campaign.record import Outcome
from chaos.campaign.traffic import CHUNKS_MAX, FAVOURITES, PROMPTS, Asked, judged, prompts
from e2e.kit import CHUNK_TOKENS
from e2e.serving import Stream

RIGHT = ([5, 6, 7, 8], [-0.1, -0.2, -0.3, -0.4])
PROMPT = [1, 2, 3]


def asked(
    tokens: list[int], reason: str = "length", leave_after_s: float | None = None, error: str = ""
) -> Asked:
    stream = Stream(tokens=tokens, logprobs=RIGHT[1][: len(tokens)], took_s=0.5, cached=2, reason=reason)
    return Asked(0, 2, leave_after_s, began_s=100.0, stream=None if error else stream, error=error)


@pytest.mark.parametrize(
    ("one", "outcome"),
    [
        (asked([5, 6]), Outcome.RIGHT),
        (asked([5, 7]), Outcome.WRONG),
        (asked([5]), Outcome.FAILED),
        (asked([5], ""), Outcome.FAILED),
        (asked([5, 6], "abort"), Outcome.FAILED),
        (asked([], error="OSError: gone"), Outcome.FAILED),
        (asked([5], "", leave_after_s=0.1), Outcome.LEFT),
        (asked([], "", leave_after_s=0.1), Outcome.LEFT),
        (asked([6], "", leave_after_s=0.1), Outcome.WRONG),
        (asked([5, 6], leave_after_s=0.1), Outcome.RIGHT),
        (asked([], error="OSError: gone", leave_after_s=0.1), Outcome.FAILED),
    ],
)
def test_an_answer_is_right_wrong_missing_or_not_waited_for(one: Asked, outcome: Outcome) -> None:
    request = judged(one, PROMPT, RIGHT, since_s=90.0, now_s=200.0)
    assert request.outcome is outcome
    assert request.at_s == 10.0
    assert bool(request.error) is (outcome is Outcome.FAILED)


def test_no_answer_is_a_failure_that_still_goes_on() -> None:
    request = judged(Asked(0, 2, None, began_s=100.0), PROMPT, RIGHT, since_s=90.0, now_s=160.0)
    assert (request.outcome, request.took_s, request.error) == (Outcome.FAILED, 60.0, "no answer")


def test_other_logprobs_are_told_and_not_judged() -> None:
    one = asked([5, 6])
    assert one.stream is not None
    one.stream.logprobs = [-0.1, -0.2001]
    request = judged(one, PROMPT, RIGHT, since_s=90.0, now_s=200.0)
    assert (request.outcome, request.same_logprobs) == (Outcome.RIGHT, False)


def test_the_pool_is_the_same_for_a_seed_and_lies_around_the_chunks_borders() -> None:
    pool = prompts(Random(1))
    assert pool == prompts(Random(1))
    assert len(pool) == PROMPTS > FAVOURITES
    beyond = {len(tokens) % CHUNK_TOKENS for tokens in pool}
    assert beyond == {CHUNK_TOKENS - 1, 0, 1, CHUNK_TOKENS // 2}
    assert max(map(len, pool)) < CHUNKS_MAX * CHUNK_TOKENS


def test_many_prompts_begin_as_another_does() -> None:
    pool = prompts(Random(2))
    begun = [tuple(tokens[:CHUNK_TOKENS]) for tokens in pool]
    assert 0.2 < 1 - len(set(begun)) / len(pool) < 0.6
