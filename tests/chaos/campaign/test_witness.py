"""Who looks on at a campaign sees each change as it is written, and what a process really holds."""

import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from chaos.campaign.record import Sample
from chaos.campaign.witness import Witness, sample
from processes import eventually

LINE = (
    '(EngineCore pid=41) WARNING 11-21 10:38:32 [heartbeat.py:186] health: healthy -> degraded why="gone"\n'
)
OTHER = (
    '(Worker pid=42) INFO 11-21 10:38:33 [heartbeat.py:186] health: recovering -> healthy why="registered"\n'
)


def test_changes_are_stamped_as_they_come_also_when_a_line_comes_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "serve.log"
    with path.open("w", buffering=1) as log, Witness(path) as witness:
        log.write("INFO something else\n" + LINE[:50])
        log.flush()
        began_s = time.monotonic()
        log.write(LINE[50:] + OTHER)
        log.flush()
        eventually(lambda: len(witness.changes) == 2, "both lines")
        assert [(each.state, each.why) for each in witness.changes] == [
            ("degraded", "gone"), ("healthy", "registered"),
        ]  # fmt: skip
        assert all(began_s <= each.at_s <= time.monotonic() for each in witness.changes)
        assert witness.processes == {"EngineCore": 41, "Worker": 42}


def of_this_process() -> Sample:
    taken = sample("this", os.getpid(), 1.0)
    assert taken is not None
    return taken


def test_a_sample_counts_files_threads_and_mappings() -> None:
    """Again if need be: what earlier tests have left may end just then."""
    eventually(_counts_right, "one file, one thread, one mapping")


def _counts_right() -> bool:
    before = of_this_process()
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.truncate(4096)
        with mmap.mmap(file.fileno(), 4096), mmap.mmap(file.fileno(), 4096):
            during = of_this_process()
    stop.set()
    thread.join()
    gained = (
        during.files - before.files - 2,  # each mapping keeps a copy of the number
        during.threads - before.threads,
        during.shared - before.shared,
    )
    assert during.rss_mib > 1.0
    after = of_this_process()
    left = (after.files, after.threads, after.shared) == (before.files, before.threads, before.shared)
    return left and gained == (1, 1, 1)  # one file, however often it is mapped


def test_a_process_that_has_ended_is_not_sampled() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert sample("a zombie", ended.pid, 1.0) is None
        ended.wait()
    assert sample("ended", ended.pid, 1.0) is None
