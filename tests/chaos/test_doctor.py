"""The doctor at servers that are well, absent, dead, stopped, of another version, or liars."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

pytest.importorskip(
    "torch", reason="the engine is not installed: `make setup` brings it", exc_type=ImportError
)

import other_version
from cache_server.protocol.presence import LOCKS, SOCKET
from cache_server.session import Session
from lmconnector.doctor.examination import OF_THE_ARENA, OF_THE_SERVER, of_the_server
from lmconnector.doctor.findings import Finding, Verdict
from lmconnector.doctor.model import layout
from processes import ServerProcess, eventually, server, short_dir

pytestmark = pytest.mark.chaos

TIMED = ("round trip", "bandwidth")  # on a machine this busy they may be a warning

ALONE = ("--canary-idle", "off")  # nobody else leaves anything there


def look(path: Path) -> dict[str, Finding]:
    findings = list(of_the_server(path, has_torch=True))
    assert [finding.check for finding in findings] == ["runtime dir", "socket", *OF_THE_SERVER, *OF_THE_ARENA]
    return {finding.check: finding for finding in findings}


def verdicts(found: dict[str, Finding], *, of: Verdict) -> list[str]:
    return [check for check, finding in found.items() if finding.verdict is of]


def check_nothing_is_left(process: ServerProcess) -> None:
    status = process.check_conservation()
    assert status.worker_rows == ()
    assert (status.arena.stocked_bytes, status.leases.outstanding) == (0, 0)
    eventually(lambda: not list((process.runtime_dir / LOCKS).iterdir()), "its file is removed")


def test_a_healthy_server_passes_and_nothing_is_left_there() -> None:
    with server(*ALONE) as process:
        found = look(process.runtime_dir)
        assert set(verdicts(found, of=Verdict.OK)) | set(TIMED) == set(found)
        assert "read back the same, 1 cleared" in found["chunk"].found
        check_nothing_is_left(process)
        assert process.status().chunks.stored == 0


def test_an_engines_chunks_are_left_alone() -> None:
    with server(*ALONE) as process:
        engine = Session(process.runtime_dir, "engine", part_bytes=1_000_000)
        hashes, contents = [os.urandom(32) for _ in range(20)], [os.urandom(1_000_000) for _ in range(20)]
        for at in range(0, len(hashes), 5):  # its stock is not for all of them at once
            slots = engine.reserve(5)
            for slot, content in zip(slots, contents[at : at + 5], strict=True):
                engine.write(slot, content)
            engine.commit(hashes[at : at + 5], slots, hashes[at - 1] if at else b"")
        found = look(process.runtime_dir)
        assert found["chunk"].verdict is Verdict.OK, found["chunk"]
        assert "engine: worker 0/1" in found["engines"].found
        status = process.status()
        assert (status.chunks.stored, status.chunks.evicted) == (20, 0)
        assert engine.load(hashes) == contents
        engine.close()
        check_nothing_is_left(process)


def test_in_a_full_arena_one_chunk_makes_room_at_most() -> None:
    with server(*ALONE, "--capacity", "16MiB", "--stock-percent", "50") as process:
        engine = Session(process.runtime_dir, "engine", part_bytes=1 << 20)
        stored = 0
        while not (evicted := process.status().chunks.evicted):
            slot = engine.reserve(1)[0]
            engine.write(slot, b"x")
            engine.commit([os.urandom(32)], [slot])
            stored += 1
            assert stored < 100
        assert look(process.runtime_dir)["chunk"].verdict is Verdict.OK
        assert process.status().chunks.evicted <= evicted + 1
        engine.close()
        check_nothing_is_left(process)


def test_without_a_server_it_says_how_to_start_one() -> None:
    with short_dir() as path:
        found = look(path / "none")
        assert verdicts(found, of=Verdict.FAIL) == ["runtime dir"]
        assert "cache-server run" in found["runtime dir"].advice
        assert len(verdicts(found, of=Verdict.SKIP)) == len(found) - 1


def test_a_dead_server_is_told_from_a_stopped_one() -> None:
    with server(*ALONE) as process:
        os.kill(process.pid, signal.SIGSTOP)
        found = look(process.runtime_dir)
        assert verdicts(found, of=Verdict.FAIL) == ["server"]
        assert found["socket"].verdict is Verdict.OK
        assert (
            found["server"].advice
            == f"process {process.pid} is stopped: kill -CONT {process.pid} lets it go on"
        )
        os.kill(process.pid, signal.SIGCONT)
        eventually(process.answers, "an answer")
        check_nothing_is_left(process)
        process.kill()
        found = look(process.runtime_dir)
        assert verdicts(found, of=Verdict.FAIL) == ["socket"]
        assert "dead" in found["socket"].found


def test_a_server_that_ends_in_the_middle_is_a_failure_and_no_more() -> None:
    with server(*ALONE) as process:
        found = []
        for finding in of_the_server(process.runtime_dir, has_torch=True):
            found.append(finding)
            if finding.check == "protocol":
                process.kill()
        failed = {finding.check: finding for finding in found if finding.verdict is Verdict.FAIL}
        assert list(failed) == ["chunk"], failed
        assert "no answer" in failed["chunk"].found
        process.start()
        eventually(lambda: not process.status().worker_rows, "the end of its visit")


@pytest.mark.parametrize(
    ("what", "check", "words"),
    [
        ("protocol", "protocol", ("speaks protocol 2..2", "you speak 1..1", "same lmconnector")),
        ("format", "arena", ("format version 2", "reads 1", "same lmconnector")),
    ],
)
def test_a_server_of_another_version_is_named_as_such(what: str, check: str, words: tuple[str, ...]) -> None:
    with short_dir() as path:
        command = [sys.executable, other_version.__file__, what, "run", "--dir", str(path)]
        with subprocess.Popen(
            [*command, "--capacity", "16MiB", "--http", "off", "--log-level", "error"]
        ) as process:
            try:
                eventually((path / SOCKET).exists, "a socket", 20.0)
                found = look(path)
            finally:
                process.kill()
        assert verdicts(found, of=Verdict.FAIL) == [check]
        for word in words:
            assert word in str(found[check])


@contextlib.contextmanager
def liar(path: Path) -> Iterator[None]:
    """Whoever asks gets bytes that are no reply."""
    (path / LOCKS).mkdir()
    context = zmq.Context()
    stop = threading.Event()

    def lie() -> None:
        with context.socket(zmq.ROUTER) as router:
            router.setsockopt(zmq.LINGER, 0)
            router.bind(f"ipc://{path / SOCKET}")
            while not stop.is_set():
                if router.poll(50):
                    who, *_ = router.recv_multipart()
                    router.send_multipart([who, b"no reply at all"])

    thread = threading.Thread(target=lie)
    thread.start()
    try:
        eventually((path / SOCKET).exists, "a socket")
        yield
    finally:
        stop.set()
        thread.join()
        context.term()


def test_a_liar_is_found_out() -> None:
    with short_dir() as path, liar(path):
        found = look(path)
        assert verdicts(found, of=Verdict.FAIL) == ["server"]
        assert "bytes that are no reply" in found["server"].found


def test_an_arena_that_is_another_file_here_is_a_failure() -> None:
    with server(*ALONE) as process, short_dir() as elsewhere:
        arena = process.runtime_dir / "arena"
        for finding in of_the_server(process.runtime_dir, has_torch=True):
            if finding.check == "protocol":
                arena.rename(elsewhere / "arena")
                arena.write_bytes(bytes(1 << 20))
            elif finding.check == "arena":
                break
        assert finding.verdict is Verdict.FAIL
        assert str(arena) in finding.found


ATTENTION = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 4,
    "intermediate_size": 128, "max_position_embeddings": 512,
}  # fmt: skip
RECURRENT = {
    "architectures": ["MambaForCausalLM"], "model_type": "mamba", "state_size": 16, "conv_kernel": 4,
    "expand": 2, "time_step_rank": 4,
}  # fmt: skip
SIZE = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("config", "verdict", "said"),
    [
        (ATTENTION, Verdict.OK, "2 layers FullAttentionSpec: supported"),
        (RECURRENT, Verdict.FAIL, "2 layers MambaSpec: KV cache of the kind MambaSpec is not supported"),
        ({"architectures": ["NobodyKnowsIt"], "model_type": "llama"}, Verdict.WARN, "could not build"),
    ],
    ids=["attention", "recurrent", "unknown"],
)
def test_a_models_kv_cache_is_judged_as_the_connector_would(
    tmp_path: Path, config: dict[str, object], verdict: Verdict, said: str
) -> None:
    pytest.importorskip(
        "vllm", reason="the engine is not installed: `make setup` brings it", exc_type=ImportError
    )
    (tmp_path / "config.json").write_text(json.dumps(SIZE | config))
    finding = layout(str(tmp_path))
    assert (finding.check, finding.verdict) == ("layout", verdict), finding
    assert said in finding.found
    assert bool(finding.advice) is (verdict is not Verdict.OK)


def command(*arguments: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "lmconnector.cli", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_config_command_prints_what_vllm_takes_or_says_what_is_wrong() -> None:
    given = command("config", "chunk_tokens=512", "--fail-after", "5")
    assert (given.returncode, given.stderr) == (0, "")
    assert json.loads(given.stdout)["kv_connector_extra_config"] == {"chunk_tokens": 512, "fail_after": 5}
    assert command("config", "--serve", "some/model").stdout.startswith("vllm serve some/model ")
    for words, said in (
        (["chunk_token=512"], "did you mean 'chunk_tokens'?"),
        (["heartbeat_timeout_s=9"], "expected at most heartbeat_interval_s"),
        (["--no-such-flag", "1"], "unrecognized arguments"),
    ):
        wrong = command("config", *words)
        assert (wrong.returncode, wrong.stdout) == (2, "")
        assert said in wrong.stderr
    assert command().returncode == command("heal").returncode == 2


def test_the_command_as_an_operator_runs_it() -> None:
    def doctor(*arguments: str) -> subprocess.CompletedProcess[str]:
        return command("doctor", *arguments)

    with server(*ALONE) as process:
        well = doctor("--dir", str(process.runtime_dir), "--json")
        report = json.loads(well.stdout)
        assert (well.returncode, report["verdict"]) in ((0, "OK"), (0, "WARN")), well.stdout
        check_nothing_is_left(process)
        process.kill()
        dead = doctor("--dir", str(process.runtime_dir))
        assert dead.returncode == 1
        assert "FAIL  socket " in dead.stdout
        assert len(dead.stdout.splitlines()) == len(report["findings"])
    assert doctor("--dri", "x").returncode == 2
