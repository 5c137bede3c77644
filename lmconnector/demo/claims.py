"""What the demo claims, each checked against what was seen.  Pure."""

from dataclasses import dataclass

from lmconnector.demo.timeline import Phase, Request, Run, typical_ms, worst_ms

TOOK_S_MAX = 240.0


@dataclass(frozen=True, slots=True)
class Claim:
    says: str
    holds: bool
    seen: str


def check(run: Run) -> list[Claim]:
    claims = [
        _none_failed(run),
        _same_tokens(run),
        _answers_differ(run),
        _hits(run, Phase.UP, "a document seen before comes from the cache"),
        _hits_are_fast(run),
        _kill_is_noticed(run),
        _serves_on(run),
        _recovers(run),
        _survived(run),
        _hits(run, Phase.BACK, "hits resume after the restart"),
        _is_short(run),
    ]
    if run.unfinished:
        claims.append(Claim("the demo came to its end", holds=False, seen=run.unfinished))
    return claims


def same_tokens(run: Run) -> tuple[list[Request], list[Request]]:
    """(all answers given once there was a cache server, those of them that were wrong)"""
    references = run.references()
    answers = run.answered(set(Phase) - {Phase.ABSENT})
    return answers, [each for each in answers if references.get(each.document) != each.tokens]


def _none_failed(run: Run) -> Claim:
    failed = [request for request in run.requests if request.error]
    seen = f"{len(run.requests) - len(failed)} of {len(run.requests)} answered"
    if failed:
        seen += f"; the first that failed, at {failed[0].start_s:.1f} s: {failed[0].error}"
    return Claim("no request failed", bool(run.requests) and not failed, seen)


def _same_tokens(run: Run) -> Claim:
    answers, wrong = same_tokens(run)
    seen = f"{len(answers) - len(wrong)} of {len(answers)} answers, {run.answer_tokens} tokens each"
    if wrong:
        seen += (
            f"; the first other one, at {wrong[0].start_s:.1f} s: document {wrong[0].document + 1}, "
            f"{list(wrong[0].tokens)} instead of {list(run.references().get(wrong[0].document, ()))}"
        )
    return Claim("the same tokens as without a cache", bool(answers) and not wrong, seen)


def _answers_differ(run: Run) -> Claim:
    """All ask the same question: only what comes from the cache can tell the documents apart."""
    references = run.references()
    different = len(set(references.values()))
    seen = f"{run.documents} documents, one question, {different} different answers"
    return Claim("the answers depend on the cached part", different == run.documents, seen)


def _hits(run: Run, phase: Phase, says: str) -> Claim:
    hits = run.answered([phase], hit=True)
    seen = f"{len(hits)} hits on {len({request.document for request in hits})} of {run.documents} documents"
    if hits:
        least = min(hits, key=lambda request: request.cached_tokens)
        seen += f", at least {least.cached_tokens} of {least.prompt_tokens} tokens each"
    return Claim(says, len({request.document for request in hits}) == run.documents, seen)


def _hits_are_fast(run: Run) -> Claim:
    computed, hits = run.answered(Phase, hit=False), run.answered(Phase, hit=True)
    computed_ms, hit_ms = typical_ms(computed), typical_ms(hits)
    if not computed or not hits:
        return Claim("a hit starts sooner", holds=False, seen=f"{len(computed)} computed, {len(hits)} hits")
    seen = f"{hit_ms:.0f} ms instead of {computed_ms:.0f} ms: {computed_ms / hit_ms:.1f} times sooner"
    return Claim("a hit starts sooner", hit_ms < computed_ms, seen)


def _kill_is_noticed(run: Run) -> Claim:
    says, killed_s = "the engine noticed the kill", run.marks.killed_s
    at_s = None if killed_s is None else run.first("degraded", killed_s, run.marks.restarted_s)
    if killed_s is None or at_s is None:
        return Claim(says, holds=False, seen="no change to `degraded` in its log")
    return Claim(says, holds=True, seen=f"degraded {1_000 * (at_s - killed_s):.0f} ms after it")


def _serves_on(run: Run) -> Claim:
    dead = run.answered([Phase.AT_KILL, Phase.DEAD])
    seen = f"{len(dead)} requests, slowest first token {worst_ms(dead):.0f} ms"
    later = run.answered([Phase.DEAD])
    return Claim("vLLM served on without it", bool(later) and not any(each.hit for each in later), seen)


def _recovers(run: Run) -> Claim:
    says, restarted_s = "the engine came back to the cache by itself", run.marks.restarted_s
    at_s = None if restarted_s is None else run.first("healthy", restarted_s)
    if restarted_s is None or at_s is None:
        return Claim(says, holds=False, seen="no change to `healthy` in its log")
    return Claim(says, holds=True, seen=f"healthy {at_s - restarted_s:.1f} s after the server's restart")


def _survived(run: Run) -> Claim:
    stored = run.documents * (run.document_tokens // run.chunk_tokens)
    return Claim(
        "what was cached survived the kill -9",
        run.restored_chunks >= stored,
        f"{run.restored_chunks} chunks found by the new server, {stored} hold the documents",
    )


def _is_short(run: Run) -> Claim:
    holds = 0 < run.took_s < TOOK_S_MAX
    return Claim(f"all of it took less than {TOOK_S_MAX:.0f} s", holds, seen=f"{run.took_s:.0f} s")
