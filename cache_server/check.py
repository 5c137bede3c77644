"""The probe for exec: how a server is, without a word to its HTTP side.

It reads the page of memory that the server's threads write (and, for `--deep`, does a job itself).  A server
that is stopped, stuck or dead can't answer, and need not: the age of what it has written last is the answer.
"""

import sys

import msgspec

from cache_server import runtime
from cache_server.beat_page import BeatRead, read_beat
from cache_server.clock import monotonic_ms
from cache_server.config import Config
from cache_server.vitals import LOOP_TURN_MS, TURN_MS

GOOD, BAD, UNKNOWN = 0, 1, 2


class Finding(msgspec.Struct, frozen=True):
    exit_code: int
    words: str


def run(config: Config, probe: str) -> int:
    finding = look(config, probe, monotonic_ms())
    print(f"{probe}: {finding.words}", file=sys.stdout if finding.exit_code == GOOD else sys.stderr)
    return finding.exit_code


def look(config: Config, probe: str, now_ms: int) -> Finding:
    try:
        if not runtime.is_served(config.runtime_dir):
            return Finding(BAD, f"no server runs on {config.dir}")
        beat = read_beat(config.runtime_dir)
    except runtime.CannotTellError as error:
        return Finding(UNKNOWN, str(error))
    except (OSError, ValueError) as error:
        return Finding(UNKNOWN, f"its page can't be read: {error}")
    if beat is None:
        return Finding(UNKNOWN, f"a server runs on {config.dir}, and has not begun its page")
    finding = judge(beat, now_ms, ready=probe != "live")
    if probe == "deep" and finding.exit_code == GOOD:
        from cache_server.deep import do_job  # noqa: PLC0415  the other probes start without it

        return Finding(*do_job(config))
    return finding


def judge(beat: BeatRead, now_ms: int, *, ready: bool) -> Finding:
    """What the page says, and first of all how old it is."""
    if beat.watch_ms > now_ms + LOOP_TURN_MS:
        return Finding(UNKNOWN, "its page is from the future: it was written on another machine")
    allowed_ms = beat.late_ms if ready else beat.stall_ms
    loop_ms = now_ms - beat.loop_ms - LOOP_TURN_MS if beat.loop_ms else 0
    watch_ms = now_ms - beat.watch_ms - TURN_MS if beat.watch_ms else 0
    leased = beat.lease_until_ms > now_ms and not ready
    if watch_ms > allowed_ms:
        return Finding(BAD, f"the process stands still: nothing was heard of its watch for {watch_ms} ms")
    if loop_ms > allowed_ms and not leased:
        return Finding(BAD, f"the main loop has not turned for {loop_ms} ms; {beat.text}")
    if not (beat.ready if ready else beat.live):
        return Finding(BAD, beat.text)
    return Finding(GOOD, beat.text)
