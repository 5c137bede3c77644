"""What was measured, as a short table for people or as JSON for machines.  Pure."""

import statistics
from collections.abc import Sequence

import msgspec


class Spread(msgspec.Struct, frozen=True):
    median: float
    least: float
    most: float


class Row(msgspec.Struct, frozen=True):
    """Ours and what stands beside it, in turn, round by round; `share`: ours over that."""

    name: str
    unit: str
    ours: Spread
    beside: str = ""
    other: Spread | None = None
    share: Spread | None = None

    def __str__(self) -> str:
        line = f"{self.name:32} {_shown(self.ours)} {self.unit:5}"
        if self.other is None or self.share is None:
            return line
        return f"{line}  {self.beside} {_shown(self.other)}  {self.share.median:.2f}x"


class Report(msgspec.Struct, frozen=True):
    version: str  # lmconnector's
    machine: str
    server: str
    rows: Sequence[Row]


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def alone(name: str, unit: str, values: Sequence[float]) -> Row:
    return Row(name, unit, spread(values))


def beside(name: str, unit: str, ours: Sequence[float], control: str, others: Sequence[float]) -> Row:
    shares = [one / other for one, other in zip(ours, others, strict=True)]
    return Row(name, unit, spread(ours), control, spread(others), spread(shares))


def as_json(report: Report) -> str:
    return msgspec.json.format(msgspec.json.encode(report)).decode()


def _shown(value: Spread) -> str:
    digits = 0 if value.median >= 100 else 1
    span = f"({value.least:.{digits}f}..{value.most:.{digits}f})"
    return f"{value.median:8.{digits}f} {span:16}"
