"""The process around the server: its first word to who started it, and its log, whatever happens."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cache_server.daemon import Starter
from cache_server.protocol.presence import SOCKET
from processes import short_dir
from tools import lacking

BUG = """
import msgspec, sys
from cache_server.config import gather, parse
from cache_server.daemon import StartError, run_in_background
config = parse(gather({"dir": sys.argv[1], "capacity": "16MiB", "http": "off"}, {}, None))
try:
    run_in_background(msgspec.structs.replace(config, policy="unheard of"))  # as only a bug makes it
except StartError as error:
    print(error)
"""
ROTATION = """
import shutil, signal, sys
from pathlib import Path
from cache_server.daemon import log_to_file
log = Path(sys.argv[1])
log.parent.mkdir()
log_to_file(log, "info")
kept = log.open()
shutil.rmtree(log.parent)
signal.raise_signal(signal.SIGHUP)
assert "can't be opened anew: No such file or directory" in kept.read(), "told in the old one"
log.parent.mkdir()
signal.raise_signal(signal.SIGHUP)
print("gone on", flush=True)
assert "gone on" not in kept.read()
"""


def run(script: str, argument: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, str(argument)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory that has no byte left."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "none", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        lacking(f"can't mount a tmpfs here: {mounted.stderr.decode().strip()}")
    (tmp_path / "filling").write_bytes(bytes(4096))
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def refused(directory: Path) -> str:
    """How a start there ends."""
    options = ("--dir", str(directory), "--capacity", "16MiB", "--http", "off", "--log-level", "error")
    command = [sys.executable, "-m", "cache_server", "run", *options]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 1
    return told.stderr


def test_a_full_file_system_is_told_with_where_it_is_and_what_to_do(full: Path) -> None:
    assert refused(full / "run") == (
        f"cache-server: dir {full}/run: No space left on device: "
        "free memory in its file system, or choose another --dir\n"
    )


def test_what_lies_in_the_sockets_place_is_named() -> None:
    with short_dir() as directory:
        (directory / SOCKET).mkdir()
        assert refused(directory) == (
            f"cache-server: dir {directory}: {directory / SOCKET}: Address already in use: "
            "see what lies there and who may use it, or choose another --dir\n"
        )


def test_only_the_first_word_is_told_and_no_other_file_gets_a_later_one(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    starter = Starter(writer)
    starter.tell("serving 1")
    another = os.open(tmp_path / "another", os.O_WRONLY | os.O_CREAT)
    assert another == writer, "the number is used again"
    starter.tell("an error, hours later")
    os.close(another)
    with os.fdopen(reader) as pipe:
        assert pipe.read() == "serving 1"
    assert (tmp_path / "another").read_text() == ""


def test_a_starter_that_has_gone_is_no_matter() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    Starter(writer).tell("serving 1")
    Starter(None).tell("serving 1")


def test_a_daemon_that_ends_by_a_bug_tells_its_starter_and_its_log() -> None:
    with short_dir() as directory:
        told = run(BUG, directory)
        assert told.stdout == f"KeyError: 'unheard of' (its log: {directory}/server.log)\n"
        log = (directory / "server.log").read_text()
        assert "ERROR server: ended by a bug\nTraceback" in log
        assert "KeyError: 'unheard of'" in log


def test_a_log_that_can_not_be_opened_anew_goes_on_where_it_was_until_it_can(tmp_path: Path) -> None:
    told = run(ROTATION, tmp_path / "logs" / "server.log")
    assert told.returncode == 0, told.stderr
    assert (tmp_path / "logs" / "server.log").read_text() == "gone on\n"


def test_a_log_that_can_not_be_opened_is_named(tmp_path: Path) -> None:
    options = ("--dir", str(tmp_path / "run"), "--log-file", str(tmp_path / "none" / "server.log"))
    command = [sys.executable, "-m", "cache_server", "run", "--daemon", *options]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert told.returncode == 1
    refusal = f"log_file = '{tmp_path}/none/server.log': No such file or directory: choose another --log-file"
    assert f"cache-server: {refusal} (its log: " in told.stderr
