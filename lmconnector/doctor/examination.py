"""The checks in order; those behind one that failed, and that need it, say so."""

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cache_server.protocol.slots import SLOT_ALIGN
from lmconnector.doctor import connection, machine, model, place
from lmconnector.doctor.findings import Finding, Verdict, as_json, fail, skip, worst
from lmconnector.doctor.visit import LOOK, RefusedError, Visit
from lmconnector.errors import UnavailableError

OF_THE_SERVER = ("server", "round trip", "engines", "arena space", "protocol")
OF_THE_ARENA = ("arena", "chunk", "bandwidth", "pinning")


@dataclass(frozen=True, slots=True)
class Question:
    runtime_dir: Path
    model: str | None
    hash_algorithm: str


def run(question: Question, *, json: bool) -> int:
    """-> the exit code"""
    findings = []
    for finding in examine(question):
        findings.append(finding)
        if not json:
            print(finding, flush=True)
    if json:
        print(as_json(findings))
    return 1 if worst(findings) is Verdict.FAIL else 0


def examine(question: Question) -> Iterator[Finding]:
    yield machine.ours()
    yield (torch := machine.torch())
    yield machine.vllm()
    yield machine.hash_stability(question.hash_algorithm, os.environ)
    yield from of_the_server(question.runtime_dir, has_torch=torch.verdict is Verdict.OK)
    if question.model is None:
        yield skip("layout", "no --model is given")
    elif importlib.util.find_spec("vllm") is None:
        yield skip("layout", "vLLM is not installed here")
    else:
        yield model.layout(question.model)


def of_the_server(path: Path, *, has_torch: bool) -> Iterator[Finding]:
    left = ["runtime dir", "socket", *OF_THE_SERVER, *OF_THE_ARENA]
    why = "the server can't be reached"
    try:
        for finding in _looked_at(path, has_torch=has_torch):
            left.remove(finding.check)
            yield finding
    except UnavailableError as error:
        yield fail(left.pop(0), str(error), place.restart(path))
        why = "the server does not answer"
    except RefusedError as refusal:
        yield fail(left.pop(0), str(refusal), LOOK)
        why = "the server refuses to be asked"
    yield from (skip(check, why) for check in left)


def _looked_at(path: Path, *, has_torch: bool) -> Iterator[Finding]:
    """Ends where what is left can't be looked at; raises `UnavailableError` and `RefusedError`."""
    for check in (place.runtime_dir, place.server_socket):
        yield (finding := check(path))
        if finding.verdict is Verdict.FAIL:
            return
    with Visit(path) as visit:
        yield connection.server(visit)
        yield connection.round_trip(visit)
        yield from connection.told(visit)
        finding, registered = connection.protocol(visit, SLOT_ALIGN)
        yield finding
        if registered is None:
            yield from (skip(check, "the server has not registered us") for check in OF_THE_ARENA)
            return
        if not has_torch:
            yield from (skip(check, "torch is not installed here") for check in OF_THE_ARENA)
            return
        from lmconnector.doctor import memory  # noqa: PLC0415  needs torch

        yield from memory.findings(visit, registered)
