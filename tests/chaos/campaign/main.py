"""A chaos campaign: a real vLLM serves on while its cache server, and the way to it, fail all the time.

usage: python -m chaos.campaign.main [--seconds N] [--seed N] [--out FOLDER] [--only KIND,KIND]
Writes report.{json,md,svg}, faults.jsonl and the logs.  Ends with 1 if anything is not as promised.
"""

import argparse
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random

import msgspec

from bench.kit import bounded, machine, provenance
from chaos.campaign import plan
from chaos.campaign.deeds import play
from chaos.campaign.picture import picture
from chaos.campaign.plan import FAULTS, Step
from chaos.campaign.record import End, Played, Request, Seen
from chaos.campaign.scene import Scene, scene
from chaos.campaign.table import sentences, tables, told
from chaos.campaign.traffic import judged, prompts, references
from chaos.campaign.verdict import Report, judge
from e2e.kit import Engine, Said, connector
from lmconnector.config import parse
from lmconnector.demo.model import make
from lmconnector.demo.timeline import Change
from tools import all_is_required

BASELINE_S = 20.0  # before the first fault
HEAL_DEADLINE_S = 60.0  # after the last: longer than any lease
AROUND_S = 900  # the engines' start, the reference run, the end
PACE_S = 0.5


class Written(msgspec.Struct, kw_only=True):
    """`report.json`"""

    provenance: dict[str, str | bool]
    machine: dict[str, str | int]
    report: Report
    seen: Seen


def main() -> None:
    asked = _arguments()
    print(f"chaos: SEED={asked.seed} TIME={asked.seconds:.0f}", flush=True)
    out = Path(asked.out)
    out.mkdir(parents=True, exist_ok=True)
    for log in out.glob("*.log"):
        log.unlink()
    with bounded(round(asked.seconds) + AROUND_S):
        seen = campaign(Random(asked.seed), asked, out)
    report = judge(seen, parse(connector(out.absolute())).timing)
    written = Written(provenance=provenance(), machine=machine(), report=report, seen=seen)
    (out / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(written)))
    (out / "report.svg").write_text(picture(seen, report))
    (out / "report.md").write_text(tables(report))
    print(tables(report), *sentences(report), sep="\n")
    sys.exit(bool(report.breaches or (report.not_run and all_is_required())))


def campaign(random: Random, asked: argparse.Namespace, out: Path) -> Seen:
    pool = prompts(Random(random.getrandbits(32)))
    steps = plan.steps(
        Random(random.getrandbits(32)), tuple(asked.only.split(",")) if asked.only else tuple(FAULTS)
    )
    with tempfile.TemporaryDirectory(prefix="chaos-") as place:
        model = make(Path(place) / "model", "llama")
        plain = Engine(out / "plain.log", cores="1", model=str(model), enable_prefix_caching=False)
        try:
            with scene(model, out, pool, random, PACE_S) as made:
                right = references(plain.started(), pool)
                plain.close()
                return _run(made, steps, asked, (pool, right), out / "faults.jsonl")
        finally:
            plain.close()


def _run(
    made: Scene,
    steps: Iterable[Step],
    asked: argparse.Namespace,
    known: tuple[list[list[int]], list[Said]],
    diary: Path,
) -> Seen:
    with made.load:
        made.since_s = time.monotonic()
        made.stage.wait(BASELINE_S)
        made.look()
        played, not_run = _play_all(made, steps, asked.seconds, diary)
        seconds = made.now_s
        made.load.end()
        end = _end(made)
    return Seen(
        seed=asked.seed,
        seconds=seconds,
        requests=_requests(made, *known),
        played=played,
        changes=_since(made.witness.changes, made.since_s),
        samples=made.samples,
        end=end,
        not_run=not_run,
    )


def _play_all(
    made: Scene, steps: Iterable[Step], seconds: float, diary: Path
) -> tuple[list[Played], tuple[str, ...]]:
    """-> those that were made, and the kinds that can't be here"""
    played: list[Played] = []
    not_run: set[str] = set()
    with diary.open("wb") as lines:
        for step in steps:
            if made.now_s + step.gap_s + step.lasts_s > seconds:
                return played, tuple(sorted(not_run))
            if FAULTS[step.kind].needs_a_mount and made.stage.mount is None:
                not_run.add(step.kind)
                continue
            played.append(play(made, step))
            lines.write(msgspec.json.encode(played[-1]) + b"\n")
            lines.flush()
            print(told(played[-1]), flush=True)
    raise AssertionError("a plan has no end")


def _end(made: Scene) -> End:
    """Waits until nothing is held any more."""
    deadline_s = time.monotonic() + HEAL_DEADLINE_S
    while time.monotonic() < deadline_s:
        made.stage.wait(1.0)
        status = made.stage.cache.status()
        over = all(one.is_over for one in made.load.asked)
        if over and not status.leases.outstanding and not status.arena.quarantined_bytes:
            break
    made.look()
    status = made.stage.cache.status()
    return End(
        leases=status.leases.outstanding,
        quarantined_bytes=status.arena.quarantined_bytes,
        unaccounted_bytes=made.unaccounted_bytes,
        locks=made.strange_locks(),
        files=made.stage.strange_files(),
        hook_errors=made.serving.metric("lmconnector_hook_errors_total"),
        tracebacks=made.serving.words().count("Traceback"),
        server_errors=made.errors_of_the_server(),
        server_deaths=made.stage.deaths,
    )


def _requests(made: Scene, pool: Sequence[list[int]], right: Sequence[Said]) -> list[Request]:
    now_s = time.monotonic()
    return [judged(one, pool[one.prompt], right[one.prompt], made.since_s, now_s) for one in made.load.asked]


def _since(changes: Iterable[Change], since_s: float) -> list[Change]:
    return [msgspec.structs.replace(each, at_s=each.at_s - since_s) for each in changes]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="chaos")
    parser.add_argument("--seconds", type=float, default=3_600.0)
    parser.add_argument("--seed", type=int, default=secrets.randbits(32))
    parser.add_argument("--out", default="out/chaos")
    parser.add_argument("--only", default="", help="kinds, with commas between")
    return parser.parse_args()


if __name__ == "__main__":
    main()
