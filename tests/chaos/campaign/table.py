"""A campaign in words: a line for each fault as it happens, tables at the end.  Pure."""

from collections.abc import Iterable

from chaos.campaign.record import Played
from chaos.campaign.verdict import Drift, Figures, Report, Row


def told(played: Played) -> str:
    step = played.step
    hit = "no hit" if played.hit_s is None else f"hit after {played.hit_s - played.healed_s:.1f} s"
    with_ = f" with {step.with_}" if step.with_ else ""
    note = f" ({played.note})" if played.note else ""
    lasted_s = played.healed_s - played.began_s
    return f"{played.began_s:7.1f} s  {step.number:3} {step.kind}{with_}{note}: {lasted_s:.1f} s, {hit}"


def sentences(report: Report) -> list[str]:
    """What is missing, what is not as promised, and the sum of it all."""
    return [
        *(f"not run: {kind}" for kind in report.not_run),
        *(f"BREACH: {breach}" for breach in report.breaches),
        f"chaos: SEED={report.seed}: {report.faults} faults in {report.seconds:.0f} s "
        f"({report.faults_per_hour:.0f}/h), {report.requests} requests, {report.hits} hits, "
        f"{report.failed} failed, {report.wrong} wrong, {report.stuck} stuck, "
        f"{len(report.breaches)} breaches",
    ]


def tables(report: Report) -> str:
    """`report.md`: what each kind of fault has cost; what each process held, first, most and last."""
    heads = ["fault", "times", "requests", "failed, wrong, stuck", "added ms p50 / p99 / most"]
    heads += [f"{what} s p50 / most" for what in ("shut after", "open after", "hit after")]
    rows = [_row(row) for row in report.rows]
    held = ["process", "files", "threads", "mappings", "MiB", "MiB an hour"]
    return "\n".join([*_lines(heads, rows), "", *_lines(held, map(_drift, report.drifts)), ""])


def _row(row: Row) -> list[str]:
    added = (
        f"{row.added_ms.p50:.0f} / {row.added_ms.p99:.0f} / {row.added_ms.most:.0f}" if row.added_ms else ""
    )
    counted = [row.kind, str(row.count), str(row.requests), f"{row.failed}, {row.wrong}, {row.stuck}", added]
    return counted + [_two(each) for each in (row.found_s, row.back_s, row.hit_s)]


def _drift(drift: Drift) -> list[str]:
    three = (drift.files, drift.threads, drift.shared, drift.rss_mib)
    slope = "" if drift.rss_mib_per_hour is None else f"{drift.rss_mib_per_hour:+.1f}"
    return [drift.process, *(" / ".join(map(str, each)) for each in three), slope]


def _two(figures: Figures | None) -> str:
    return f"{figures.p50:.1f} / {figures.most:.1f}" if figures else ""


def _lines(heads: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]
