"""What the times to first token of `bench.ttft` come to: figures, ratios, a table and pictures.  Pure."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import mean

from bench.kit import spread
from bench.picture import Bar, Chart, bar_of, picture


class Way(StrEnum):
    """Where the KV cache of a prompt comes from."""

    COLD = "cold"  # it is computed
    LOCAL = "local"  # vLLM's own prefix cache
    EXTERNAL = "external"  # the connector's cache, in the process that stored it
    NEW_PROCESS = "new process"  # the same, in an engine process that did not store it
    RESTARTED = "server restarted"  # the same, after a kill -9 of the cache server


@dataclass(frozen=True)
class Cell:
    """Prompts of one length that come at once."""

    tokens: int
    concurrency: int
    cold_rounds: int
    hit_rounds: int
    question_tokens: int = 0  # behind the cached ones, new with each request

    @property
    def name(self) -> str:
        question = f" + {self.question_tokens} new" if self.question_tokens else ""
        return f"{self.tokens}{question} x {self.concurrency}"


@dataclass(frozen=True)
class Ask:
    """What came of one round: each request's time to first token, and how much of it was cached."""

    cell: str
    variant: str
    way: Way
    number: int
    first_ms: list[float]
    cached: list[int]

    @property
    def ttft_ms(self) -> float:
        return mean(self.first_ms)


Key = tuple[str, Way]
RATIOS: tuple[tuple[str, Key, Key], ...] = (
    ("lmconnector / own hit", ("lmconnector", Way.EXTERNAL), ("vLLM", Way.LOCAL)),
    ("lmconnector / LMCache", ("lmconnector", Way.EXTERNAL), ("LMCache", Way.EXTERNAL)),
    ("new process: lmconnector / own hit", ("lmconnector", Way.NEW_PROCESS), ("vLLM", Way.LOCAL)),
    ("new process: lmconnector / LMCache", ("lmconnector", Way.NEW_PROCESS), ("LMCache", Way.NEW_PROCESS)),
    ("restarted: lmconnector / own hit", ("lmconnector", Way.RESTARTED), ("vLLM", Way.LOCAL)),
    ("own hit with lmconnector / without", ("lmconnector", Way.LOCAL), ("vLLM", Way.LOCAL)),
    ("computed with lmconnector / without", ("lmconnector", Way.COLD), ("vLLM", Way.COLD)),
    ("computed with LMCache / without", ("LMCache", Way.COLD), ("vLLM", Way.COLD)),
)
SERIES: tuple[tuple[str, Key], ...] = (
    ("computed", ("vLLM", Way.COLD)),
    ("vLLM's own prefix hit", ("vLLM", Way.LOCAL)),
    ("lmconnector hit", ("lmconnector", Way.EXTERNAL)),
    ("LMCache hit", ("LMCache", Way.EXTERNAL)),
    ("ExampleConnector hit", ("ExampleConnector", Way.EXTERNAL)),
)
LATER: tuple[tuple[str, Key], ...] = (
    ("lmconnector, new process", ("lmconnector", Way.NEW_PROCESS)),
    ("lmconnector, server restarted", ("lmconnector", Way.RESTARTED)),
    ("LMCache, new process", ("LMCache", Way.NEW_PROCESS)),
)


def figures(asks: Sequence[Ask]) -> dict:
    """By cell: the times of each variant and way, in ms, and the ratios, round by round."""
    cells = list(dict.fromkeys(ask.cell for ask in asks))
    return {"cells": {cell: _figures([ask for ask in asks if ask.cell == cell]) for cell in cells}}


def _figures(asks: Sequence[Ask]) -> dict:
    by_key: dict[Key, dict[int, Ask]] = {}
    for ask in asks:
        by_key.setdefault((ask.variant, ask.way), {})[ask.number] = ask
    times = {_name(key): _times(list(rounds.values())) for key, rounds in by_key.items()}
    ratios: dict[str, dict] = {}
    for name, one, other in RATIOS:
        both = by_key.get(one, {}).keys() & by_key.get(other, {}).keys()
        if both:
            each = [by_key[one][at].ttft_ms / by_key[other][at].ttft_ms for at in sorted(both)]
            ratios[name] = {**spread(each, 2), "rounds": len(each)}
    return {"ttft_ms": times, "ratios": ratios}


def _times(asks: Sequence[Ask]) -> dict:
    return {
        **spread([ask.ttft_ms for ask in asks], 1),
        "rounds": len(asks),
        "last_ms": round(max(first for ask in asks for first in ask.first_ms), 1),
        "cached": [min(min(ask.cached) for ask in asks), max(max(ask.cached) for ask in asks)],
    }


def _name(key: Key) -> str:
    return f"{key[0]}, {key[1]}"


def table(found: dict) -> list[str]:
    """As Markdown: all times, the hits that somebody else's process had stored, and the ratios."""
    cells = found["cells"]
    times = {name: each["ttft_ms"] for name, each in cells.items()}
    ratios = {name: each["ratios"] for name, each in cells.items()}
    labels = {name: name for name, *_ in RATIOS}
    return [
        *_rows("ms", dict(SERIES), times, 0),
        "",
        *_rows("ms", dict(LATER), {cell: row for cell, row in times.items() if _name(LATER[0][1]) in row}, 0),
        "",
        *_rows("ratio", labels, ratios, 2),
    ]


def _rows(
    corner: str, columns: dict[str, Key] | dict[str, str], rows: dict[str, dict], digits: int
) -> list[str]:
    lines = [f"| {corner} | {' | '.join(columns)} |", f"| --- |{' --- |' * len(columns)}"]
    for cell, row in rows.items():
        names = (key if isinstance(key, str) else _name(key) for key in columns.values())
        lines.append(f"| {cell} | {' | '.join(_interval(row.get(name), digits) for name in names)} |")
    return lines


def _interval(value: dict | None, digits: int) -> str:
    if value is None:
        return ""
    median, least, most = (f"{value[name]:,.{digits}f}" for name in ("median", "least", "most"))
    return f"{median} ({least}..{most})"


def pictures(found: dict) -> dict[str, str]:
    """By name: one request at a time, and many at once."""
    alone = [cell for cell in found["cells"] if cell.endswith(" x 1")]
    crowds = [cell for cell in found["cells"] if not cell.endswith(" x 1")]
    note = "Median of all rounds, and how far they lie apart. Logarithmic; shorter is better."
    return {
        "ttft": _chart("Time to first token, one request at a time", note, found, alone, _tokens_only),
        "concurrency": _chart("Time to first token, mean of requests that come at once", note, found, crowds),
    }


def _tokens_only(cell: str) -> str:
    return f"{cell.removesuffix(' x 1')} tokens"


def _chart(title: str, note: str, found: dict, cells: Iterable[str], name: Callable[[str], str] = str) -> str:
    rows = {cell: found["cells"][cell]["ttft_ms"] for cell in cells}
    shown = [(label, key) for label, key in SERIES if any(_name(key) in row for row in rows.values())]
    groups: dict[str, Sequence[Bar | None]] = {
        name(cell): [bar_of(row[_name(key)]) if _name(key) in row else None for _, key in shown]
        for cell, row in rows.items()
    }
    return picture(Chart(title, "ms", [label for label, _ in shown], groups, logarithmic=True, note=note))
