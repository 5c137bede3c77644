"""The job of `check --deep`: the canary's, done by a process of its own.

However many probes are started, one does its job at a time.  It leaves what came of it in the lock's file:
who asked before that run began, and has waited meanwhile, needs none of its own.
"""

import contextlib
import os
import select
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cache_server.answers import PASSED
from cache_server.canary import Order, Run, part_bytes_for
from cache_server.client import Client, RefusedError, UnreachableError
from cache_server.clock import monotonic_ms
from cache_server.config import Config
from cache_server.job import Job
from cache_server.json_text import decoded
from cache_server.protocol import messages as m
from cache_server.protocol.codec import ProtocolError
from cache_server.protocol.presence import CANARY_LOCK, lock_now, open_shared
from cache_server.report import Status
from cache_server.trials import Outcome, Result

LOCK_PAUSE_S = 0.01
FILE_BYTES_MAX = 4_096


class _Passed(msgspec.Struct, frozen=True):
    """Another probe's run; a failure is not passed on, it may have had less time."""

    began_ms: int
    job: Job
    outcome: Outcome


def do_job(config: Config) -> tuple[int, str]:
    """-> exit code and words"""
    outcome = _one_at_a_time(config)
    where = f" at {outcome.stage}: {outcome.reason}" if outcome.stage else ""
    failed = outcome.result is Result.FAILED
    return int(failed), f"{outcome.result.value}{where} ({outcome.took_ms} ms)"


def _one_at_a_time(config: Config) -> Outcome:
    asked_ms = monotonic_ms()
    end_ms = asked_ms + config.canary_deadline
    try:
        with _canary_lock(config.runtime_dir, end_ms) as fd:
            other = _read(fd)
            if (
                other is not None
                and asked_ms <= other.began_ms <= monotonic_ms()
                and other.job == config.canary_job
            ):
                return other.outcome
            began_ms = monotonic_ms()
            outcome = _run(config, end_ms)
            if outcome.result in PASSED:
                _write(fd, _Passed(began_ms, config.canary_job, outcome))
            return outcome
    except (UnreachableError, RefusedError, OSError, ProtocolError, msgspec.ValidationError) as error:
        return Outcome(Result.FAILED, "connect", str(error), config.canary_deadline)


def _run(config: Config, end_ms: int) -> Outcome:
    with Client(config.runtime_dir, config.canary_deadline) as client:
        reply = client.ask(m.Status(id=client.next_id()), m.StatusReply)
    slots = msgspec.convert(reply.status, Status).slots
    part_bytes = part_bytes_for(config.canary_job, slots, config.canary_bytes_max, os.getpid())
    left_ms = max(1, end_ms - monotonic_ms())
    return Run(Order(config.runtime_dir, config.canary_job, part_bytes, left_ms), monotonic_ms).do()


def _read(fd: int) -> _Passed | None:
    return decoded(os.pread(fd, FILE_BYTES_MAX, 0), _Passed)


def _write(fd: int, passed: _Passed) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, msgspec.json.encode(passed), 0)


@contextlib.contextmanager
def _canary_lock(runtime_dir: Path, end_ms: int) -> Iterator[int]:
    fd = open_shared(runtime_dir / CANARY_LOCK)
    try:
        while not lock_now(fd):
            if monotonic_ms() >= end_ms:
                raise UnreachableError("another probe is still at it")
            select.select([], [], [], LOCK_PAUSE_S)
        yield fd
    finally:
        os.close(fd)
