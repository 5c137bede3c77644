"""Each claim of the demo holds in a good run, and is seen broken in a bad one."""

from collections.abc import Callable

import msgspec
import pytest

from demo_run import a_run, request
from lmconnector.demo.claims import check, same_tokens
from lmconnector.demo.timeline import Request, Run

FAILED = "no request failed"
SAME = "the same tokens as without a cache"
DIFFER = "the answers depend on the cached part"
HITS = "a document seen before comes from the cache"
FAST = "a hit starts sooner"
NOTICED = "the engine noticed the kill"
SERVED = "vLLM served on without it"
RECOVERED = "the engine came back to the cache by itself"
SURVIVED = "what was cached survived the kill -9"
RESUMED = "hits resume after the restart"
SHORT = "all of it took less than 240 s"
ALL = {FAILED, SAME, DIFFER, HITS, FAST, NOTICED, SERVED, RECOVERED, SURVIVED, RESUMED, SHORT}


def broken(run: Run) -> set[str]:
    return {claim.says for claim in check(run) if not claim.holds}


def seen(run: Run, says: str) -> str:
    return next(claim.seen for claim in check(run) if claim.says == says)


def changed(run: Run, wanted: Callable[[Request], bool], **fields: object) -> Run:
    run.requests = [
        msgspec.structs.replace(each, **fields) if wanted(each) else each for each in run.requests
    ]
    return run


def test_in_a_good_run_all_hold() -> None:
    assert {claim.says for claim in check(a_run())} == ALL
    assert broken(a_run()) == set()


def test_what_was_seen_is_counted() -> None:
    run = a_run()
    assert seen(run, FAILED) == "12 of 12 answered"
    assert seen(run, SAME) == "10 of 10 answers, 2 tokens each"
    assert seen(run, HITS) == "2 hits on 2 of 2 documents, at least 512 of 600 tokens each"
    assert seen(run, FAST) == "50 ms instead of 500 ms: 10.0 times sooner"
    assert seen(run, NOTICED) == "degraded 10 ms after it"
    assert seen(run, SERVED) == "3 requests, slowest first token 500 ms"
    assert seen(run, RECOVERED) == "healthy 0.4 s after the server's restart"
    assert seen(run, SHORT) == "70 s"
    assert seen(run, SURVIVED) == "4 chunks found by the new server, 4 hold the documents"


def test_a_failed_request_is_told() -> None:
    run = a_run()
    run.requests.append(request(0, 40, 41, error="HTTP 500"))
    assert broken(run) == {FAILED}
    assert seen(run, FAILED) == "12 of 13 answered; the first that failed, at 40.0 s: HTTP 500"


def test_one_wrong_token_is_told() -> None:
    run = a_run()
    run.requests.append(request(1, 40, 41, cached=512, tokens=(7, 9)))
    assert broken(run) == {SAME}
    assert seen(run, SAME).endswith("at 40.0 s: document 2, [7, 9] instead of [7, 8]")
    answers, wrong = same_tokens(run)
    assert (len(answers), [each.tokens for each in wrong]) == (11, [(7, 9)])


def test_without_references_nothing_is_the_same() -> None:
    run = a_run()
    run.requests = [each for each in run.requests if each.start_s >= 10]
    assert broken(run) == {SAME, DIFFER}


def test_equal_answers_prove_nothing() -> None:
    assert broken(changed(a_run(), lambda _: True, tokens=(1, 1))) == {DIFFER}


@pytest.mark.parametrize(
    ("begin_s", "end_s", "says"), [(10, 20, HITS), (30, 99, RESUMED)], ids=["before", "after"]
)
def test_a_document_that_never_hits_is_told(begin_s: float, end_s: float, says: str) -> None:
    def of_the_second(each: Request) -> bool:
        return each.document == 1 and begin_s <= each.start_s < end_s

    assert broken(changed(a_run(), of_the_second, cached_tokens=0)) == {says}


def test_hits_that_are_no_faster_are_told() -> None:
    assert broken(changed(a_run(), lambda each: each.hit, ttft_ms=500.0)) == {FAST}
    no_hits = changed(a_run(), lambda each: each.hit, cached_tokens=0)
    assert broken(no_hits) == {HITS, FAST, RESUMED}
    assert seen(no_hits, FAST) == "12 computed, 0 hits"


def test_a_kill_that_nobody_noticed_is_told() -> None:
    run = a_run()
    run.changes = [each for each in run.changes if each.why != "connection closed"]
    assert broken(run) == {NOTICED}


def test_a_kill_noticed_after_the_restart_was_not_noticed() -> None:
    run = a_run()
    run.changes[3] = msgspec.structs.replace(run.changes[3], at_s=30.1)
    assert broken(run) == {NOTICED}


def test_an_outage_without_answers_is_told() -> None:
    run = a_run()
    run.requests = [each for each in run.requests if not 20 <= each.start_s < 30]
    assert broken(run) == {SERVED}
    assert broken(changed(a_run(), lambda each: 20 < each.start_s < 30, cached_tokens=512)) == {SERVED}


def test_an_engine_that_stays_degraded_is_told() -> None:
    run = a_run()
    run.changes = run.changes[:-2]
    assert broken(run) == {RECOVERED}


def test_lost_chunks_are_told() -> None:
    assert broken(a_run(restored_chunks=3)) == {SURVIVED}


@pytest.mark.parametrize("took_s", [0.0, 240.0])
def test_a_demo_that_takes_long_is_told(took_s: float) -> None:
    assert broken(a_run(took_s=took_s)) == {SHORT}


def test_a_run_that_was_cut_short_proves_little() -> None:
    run = a_run(
        killed_s=None, restarted_s=None, restored_chunks=0, unfinished="waited in vain for hits, for 90 s"
    )
    run.requests = [each for each in run.requests if each.start_s < 19]
    run.changes = run.changes[:3]
    cut_short = "the demo came to its end"
    assert broken(run) == {NOTICED, SERVED, RECOVERED, SURVIVED, RESUMED, cut_short}
    assert seen(run, cut_short) == "waited in vain for hits, for 90 s"


def test_a_run_without_requests_claims_nothing() -> None:
    run = a_run(requests=[], changes=[], restored_chunks=0, took_s=0.0)
    assert broken(run) == ALL
