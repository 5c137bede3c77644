"""What a check found, as a line for people or as JSON for machines.  Pure."""

from collections.abc import Sequence
from enum import Enum

import msgspec


class Verdict(Enum):
    OK = "OK"
    WARN = "WARN"  # works, but not as it should
    FAIL = "FAIL"  # the cache can't be used like this
    SKIP = "SKIP"  # could not be looked at, for the reason of another finding


class Finding(msgspec.Struct, frozen=True):
    check: str
    verdict: Verdict
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.verdict.value:4}  {self.check:13}  {self.found}" + (
            f" -> {self.advice}" if self.advice else ""
        )


def ok(check: str, found: str) -> Finding:
    return Finding(check, Verdict.OK, found)


def warn(check: str, found: str, advice: str) -> Finding:
    return Finding(check, Verdict.WARN, found, advice)


def fail(check: str, found: str, advice: str) -> Finding:
    return Finding(check, Verdict.FAIL, found, advice)


def skip(check: str, why: str) -> Finding:
    return Finding(check, Verdict.SKIP, f"not looked at: {why}")


def worst(findings: Sequence[Finding]) -> Verdict:
    verdicts = {finding.verdict for finding in findings}
    return next((each for each in (Verdict.FAIL, Verdict.WARN) if each in verdicts), Verdict.OK)


def as_json(findings: Sequence[Finding]) -> str:
    report = {"verdict": worst(findings), "findings": findings}
    return msgspec.json.format(msgspec.json.encode(report)).decode()
