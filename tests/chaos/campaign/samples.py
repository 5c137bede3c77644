"""Campaigns as they might have been, for the tests of what is made of them."""

from collections.abc import Sequence

from chaos.campaign.plan import Step
from chaos.campaign.record import End, Outcome, Played, Request, Sample, Seen
from lmconnector.demo.timeline import Change

AT_REST = End(
    leases=0, quarantined_bytes=0, unaccounted_bytes=0, locks=0, files=(), hook_errors=0, tracebacks=0,
    server_errors=0, server_deaths=0,
)  # fmt: skip


def request(at_s: float, took_s: float = 0.2, **other: object) -> Request:
    usual = {"first_token_s": took_s / 2, "prompt_tokens": 500, "answer_tokens": 8, "cached_tokens": 384}
    return Request(at_s=at_s, took_s=took_s, **{"outcome": Outcome.RIGHT, **usual, **other})


def played(
    kind: str, began_s: float, healed_s: float, hit_s: float | None, *, with_: str = "", number: int = 2
) -> Played:
    step = Step(number, kind, gap_s=1.0, lasts_s=healed_s - began_s, seed=7, with_=with_)
    return Played(step=step, began_s=began_s, healed_s=healed_s, hit_s=hit_s)


def sample(at_s: float, process: str = "EngineCore", **other: object) -> Sample:
    usual = {"pid": 41, "files": 40, "threads": 9, "shared": 3, "rss_mib": 500.0}
    return Sample(**{"at_s": at_s, "process": process, **usual, **other})


def change(at_s: float, state: str, process: str = "EngineCore pid=41") -> Change:
    return Change(at_s, process, state, "for a reason")


def seen(
    requests: Sequence[Request] = (),
    faults: Sequence[Played] = (),
    changes: Sequence[Change] = (),
    samples: Sequence[Sample] = (),
    *,
    seconds: float = 100.0,
    end: End = AT_REST,
) -> Seen:
    return Seen(
        seed=7,
        seconds=seconds,
        requests=requests,
        played=faults,
        changes=[change(-1.0, "healthy"), *changes],
        samples=samples,
        end=end,
    )
