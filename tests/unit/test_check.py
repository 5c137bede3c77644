"""The exec probe's judgement, by a page that is old, damaged, of the future or not there."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cache_server.beat_page import MAGIC, PAGE_BYTES, WORD_BYTES, BeatPage, read_beat
from cache_server.check import BAD, GOOD, UNKNOWN, judge, look
from cache_server.config import Config, gather, parse
from cache_server.protocol.presence import BEAT, PID
from cache_server.runtime import Access, prepare, sole_server
from cache_server.vitals import LOOP_TURN_MS, TURN_MS
from nobody import only_root, somebody_else
from processes import short_dir

LATE_MS, STALL_MS = 2_000, 10_000
NOW_MS = 50_000_000


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Config]:
    """A runtime dir whose lock proves that a server runs: this process."""
    config = parse(gather({"dir": str(tmp_path / "run")}, {}, None))
    prepare(config.runtime_dir)
    with sole_server(config.runtime_dir, Access(None)):
        yield config


@pytest.fixture
def page(served: Config) -> Iterator[BeatPage]:
    page = BeatPage(served.runtime_dir, LATE_MS, STALL_MS)
    page.loop_turned(NOW_MS, 1)
    page.watch_turned(NOW_MS, live=True, ready=True, text="ready ok")
    yield page
    page.close()


def said(config: Config, probe: str, after_ms: int = 0) -> int:
    return look(config, probe, NOW_MS + after_ms).exit_code


def test_a_page_that_is_well_and_young_is_good(served: Config, page: BeatPage) -> None:
    assert (said(served, "live"), said(served, "ready")) == (GOOD, GOOD)


def test_no_page_a_short_one_and_a_foreign_one_can_not_tell(served: Config) -> None:
    assert said(served, "live") == UNKNOWN
    file = served.runtime_dir / BEAT
    for content in (b"", b"short", bytes(PAGE_BYTES), b"\xff" * PAGE_BYTES):
        file.write_bytes(content)
        assert {said(served, probe) for probe in ("live", "ready", "deep")} == {UNKNOWN}, content[:8]
    file.unlink()
    file.mkdir()
    assert said(served, "live") == UNKNOWN


def test_a_page_of_the_future_is_of_another_machine(served: Config, page: BeatPage) -> None:
    assert said(served, "live", -LOOP_TURN_MS) == GOOD
    finding = look(served, "live", NOW_MS - LOOP_TURN_MS - 1)
    assert finding.exit_code == UNKNOWN
    assert "from the future" in finding.words


def test_without_a_server_it_is_bad(tmp_path: Path) -> None:
    config = parse(gather({"dir": str(tmp_path)}, {}, None))
    assert look(config, "live", NOW_MS).exit_code == BAD


@pytest.mark.parametrize(("probe", "allowed_ms"), [("ready", LATE_MS), ("live", STALL_MS)])
def test_its_age_is_judged_to_the_millisecond(
    served: Config, page: BeatPage, probe: str, allowed_ms: int
) -> None:
    page.watch_turned(NOW_MS + 1_000_000, live=True, ready=True, text="ready ok")
    page.loop_turned(NOW_MS + 1_000_000, 2)
    at_ms = 1_000_000 + allowed_ms + TURN_MS
    page.loop_turned(NOW_MS + at_ms, 3)
    assert said(served, probe, at_ms) == GOOD
    assert said(served, probe, at_ms + 1) == BAD
    assert "the process stands still" in look(served, probe, NOW_MS + at_ms + 1).words


@pytest.mark.parametrize(("probe", "allowed_ms"), [("ready", LATE_MS), ("live", STALL_MS)])
def test_the_loops_age_counts_by_itself(served: Config, page: BeatPage, probe: str, allowed_ms: int) -> None:
    at_ms = allowed_ms + LOOP_TURN_MS
    for after_ms, expected in ((at_ms, GOOD), (at_ms + 1, BAD)):
        page.watch_turned(NOW_MS + after_ms, live=True, ready=True, text="ready ok")
        assert said(served, probe, after_ms) == expected


def test_a_lease_excuses_the_loop_while_it_lasts_and_for_liveness_alone(
    served: Config, page: BeatPage
) -> None:
    page.leased(NOW_MS + 30_000)
    for after_ms, live in ((29_999, GOOD), (30_000, BAD)):
        page.watch_turned(NOW_MS + after_ms, live=True, ready=True, text="ready ok")
        assert said(served, "live", after_ms) == live
        assert said(served, "ready", after_ms) == BAD


def test_the_watchs_word_is_passed_on(served: Config, page: BeatPage) -> None:
    page.watch_turned(NOW_MS, live=True, ready=False, text="failing canary: failed at read")
    finding = look(served, "ready", NOW_MS)
    assert (finding.exit_code, finding.words) == (BAD, "failing canary: failed at read")
    assert said(served, "live") == GOOD
    page.watch_turned(NOW_MS, live=False, ready=False, text="failing dead: http")
    assert said(served, "live") == BAD


def test_the_exit_code_is_the_commands(served: Config) -> None:
    command = [sys.executable, "-m", "cache_server", "check", "--live", "--dir", served.dir]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (told.returncode, told.stdout) == (UNKNOWN, "")
    assert f"a server runs on {served.dir}, and has not begun its page" in told.stderr


def test_a_server_is_one_whatever_its_pid_file_says(served: Config, page: BeatPage) -> None:
    (served.runtime_dir / PID).unlink()
    assert said(served, "live") == GOOD


def test_a_page_that_a_successor_has_made_is_left_to_it(served: Config, page: BeatPage) -> None:
    """Of a server whose runtime dir was removed under it, and made anew."""
    with contextlib.closing(BeatPage(served.runtime_dir, LATE_MS, STALL_MS)):
        page.close()
        assert read_beat(served.runtime_dir) is not None


@only_root
def test_who_may_not_look_can_not_tell() -> None:
    with short_dir() as directory:
        config = parse(gather({"dir": str(directory)}, {}, None))
        with sole_server(directory, Access(None)), contextlib.closing(BeatPage(directory, LATE_MS, STALL_MS)):
            with somebody_else():
                assert look(config, "live", NOW_MS).exit_code == UNKNOWN
                assert "Permission denied" in look(config, "live", NOW_MS).words
            directory.chmod(0o755)  # but its page is for its user alone
            with somebody_else():
                finding = look(config, "live", NOW_MS)
    assert finding.exit_code == UNKNOWN
    assert "its page can't be read: [Errno 13] Permission denied" in finding.words


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.one_of(st.integers(0, 2**64 - 1), st.integers(NOW_MS - 20_000, NOW_MS + 20_000)),
        min_size=16,
        max_size=16,
    ),
    text=st.binary(max_size=64),
)
def test_whatever_is_in_the_page_is_judged(tmp_path: Path, words: list[int], text: bytes) -> None:
    words[0] = MAGIC
    content = b"".join(word.to_bytes(WORD_BYTES, "little") for word in words) + text
    (tmp_path / BEAT).write_bytes(content.ljust(PAGE_BYTES, b"\0"))
    beat = read_beat(tmp_path)
    assert beat is not None
    for ready in (False, True):
        assert judge(beat, NOW_MS, ready=ready).exit_code in (GOOD, BAD, UNKNOWN)
