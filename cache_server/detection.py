"""How soon what is told, computed from the options: docs, probes and tests stand on these bounds.  Pure."""

import msgspec

from cache_server.config import Config
from cache_server.vitals import LOOP_TURN_MS, SNAPSHOT_MS, TURN_MS


class Detection(msgspec.Struct, frozen=True):
    """Each from the moment when it happens, to the first answer that says so; ms."""

    thread_dead_ms: int  # /live
    loop_still_unready_ms: int  # /ready
    loop_still_dead_ms: int  # /live
    process_stopped_unready_ms: int  # check --ready
    process_stopped_dead_ms: int  # check --live
    path_broken_ms: int  # /ready, when nobody uses the path
    path_mended_ms: int
    livelock_ms: int  # degraded
    draining_ms: int  # /ready
    paused_ms: int  # /ready
    worker_silent_ms: int  # its row, and what it means for readiness
    memory_ms: int  # the memory tier's row


def detection(config: Config) -> Detection:
    rules = config.trial_rules
    told_ms = LOOP_TURN_MS + SNAPSHOT_MS + TURN_MS  # from the loop's knowledge to the state
    run_ms = rules.deadline_ms + rules.slack_ms + rules.retry_ms + 2 * TURN_MS
    return Detection(
        thread_dead_ms=0,
        loop_still_unready_ms=config.late_after + LOOP_TURN_MS,
        loop_still_dead_ms=config.stall_after + LOOP_TURN_MS,
        process_stopped_unready_ms=config.late_after + TURN_MS,
        process_stopped_dead_ms=config.stall_after + TURN_MS,
        path_broken_ms=rules.idle_ms + rules.fail_after * run_ms + TURN_MS,
        path_mended_ms=run_ms + TURN_MS,
        livelock_ms=config.work_age + LOOP_TURN_MS + TURN_MS,
        draining_ms=0,
        paused_ms=TURN_MS,
        worker_silent_ms=config.silent_after + told_ms,
        memory_ms=told_ms,
    )
