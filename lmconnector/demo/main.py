"""`make demo` and `lmconnector demo`: set up, play the story, check every claim, tidy away."""

import contextlib
import io
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from lmconnector.demo import processes
from lmconnector.demo.claims import check
from lmconnector.demo.healthlog import plain
from lmconnector.demo.load import serves
from lmconnector.demo.picture import picture
from lmconnector.demo.processes import Child, DemoError
from lmconnector.demo.story import Story
from lmconnector.demo.table import table
from lmconnector.demo.terminal import BOLD, GREEN, RED, Terminal
from lmconnector.demo.timeline import Run

MEMORY = Path("/dev/shm")  # noqa: S108  the engine and the server share it
SPACE_BYTES = 384 << 20  # the arena, the model, and what vLLM's own processes share
START_DEADLINE_S = 240.0
ENDING = (signal.SIGTERM, signal.SIGHUP)
LOOK_S = 0.2  # between two looks at something that takes its time


def main(out: Path = Path("out")) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without our letters is no reason to fail
    terminal = Terminal(sys.stdout)
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda received, _frame: sys.exit(128 + received))
    try:
        with _tidied(terminal) as later:
            return _show(terminal, out, later)
    except DemoError as error:
        terminal.line(f"lmconnector demo: {error}", RED)
        return 1
    except KeyboardInterrupt:
        terminal.line("stopped: the processes and their memory are gone")
        return 128 + signal.SIGINT


@contextlib.contextmanager
def _tidied(terminal: Terminal) -> Iterator[contextlib.ExitStack]:
    """What the stack holds is done in the end, and no signal interrupts that."""
    later = contextlib.ExitStack()
    try:
        yield later
    finally:
        for number in (signal.SIGINT, *ENDING):
            signal.signal(number, signal.SIG_IGN)
        terminal.living(time.monotonic(), "vLLM and the cache server are being stopped")
        later.close()
        terminal.line()


def _show(terminal: Terminal, out: Path, later: contextlib.ExitStack) -> int:
    began_s = time.monotonic()
    version = processes.vllm_version()
    directory = _directory(later)
    logs = _logs(out)
    terminal.line("lmconnector demo: a real vLLM, a real cache server, one kill -9; about two minutes", BOLD)

    terminal.line("\n[1/4] A tiny model", BOLD)
    terminal.paragraph("Made on the spot, with random weights: nothing is downloaded.")
    maker = processes.model_maker(directory / "model", logs["model"])
    later.callback(maker.stop)
    _wait(terminal, maker.check_done, maker, "making the model")

    cpus = processes.cpus()
    story = Story(
        terminal,
        directory / "server",
        logs["server"],
        f"vLLM {version} on {len(cpus)} CPU core{'s'[: len(cpus) - 1]} ({platform.machine()})",
    )
    terminal.line("\n[2/4] vLLM with the connector", BOLD)
    terminal.paragraph(
        "As with `vllm serve`. There is no cache server yet, and vLLM starts all the same; on CPU that takes "
        "up to a minute.",
    )
    later.callback(lambda: story.server.stop() if story.server else None)  # after vLLM
    port = processes.free_port()
    engine = processes.vllm(
        directory / "model", directory / "server", port, logs["vllm"], story.on_engine_line
    )
    later.callback(engine.stop)
    terminal.command(engine.typed)
    _wait(terminal, lambda: engine.check_alive() and serves(port), engine, "Python imports vLLM")

    terminal.line("\n[3/4] Requests, without a break", BOLD)
    terminal.paragraph(
        f"{story.run.documents} documents of {story.run.document_tokens} tokens, each followed by the same "
        "question, one request after the other. vLLM's own prefix cache is off: every hit comes from the "
        "cache server. Shown is the time to the first token.",
    )
    run = story.play(port, engine)
    run.took_s = time.monotonic() - began_s

    terminal.line("\n[4/4] What was seen", BOLD)
    return _report(terminal, run, out, logs)


def _report(terminal: Terminal, run: Run, out: Path, logs: dict[str, Path]) -> int:
    (out / "demo.svg").write_text(picture(run))
    claims = check(run)
    data = msgspec.json.encode({"claims": claims, "run": run})
    (out / "demo.json").write_bytes(msgspec.json.format(data) + b"\n")
    terminal.line()
    for line in table(run):
        terminal.line(f"  {line}")
    terminal.line()
    for claim in claims:
        mark, style = ("yes", "") if claim.holds else ("NO ", RED)
        terminal.item(f"  {mark}  ", f"{claim.says}: {claim.seen}", style)
    terminal.line()
    terminal.line(f"  picture  {out / 'demo.svg'}", BOLD)
    terminal.line(f"  figures  {out / 'demo.json'}")
    terminal.line(f"  logs     {', '.join(map(str, logs.values()))}")
    broken = sum(not claim.holds for claim in claims)
    if broken:
        terminal.line(
            f"\nThe demo has failed: {broken} of its {len(claims)} claims do not hold, see NO above.", RED
        )
    return 1 if broken else 0


def _wait(terminal: Terminal, done: Callable[[], bool], child: Child, at_first: str) -> None:
    """Shows that the child lives, by its own last words."""
    began_s = time.monotonic()
    pause = threading.Event()
    while not done():
        if time.monotonic() - began_s > START_DEADLINE_S:
            raise DemoError(
                f"{child.name} was not ready within {START_DEADLINE_S:.0f} s; its last words, of those in "
                f"{child.log}: {child.last_line}"
            )
        terminal.living(began_s, f"{child.name}: {plain(child.last_line)}" if child.last_line else at_first)
        pause.wait(LOOK_S)
    terminal.line(f"      ready after {time.monotonic() - began_s:.0f} s", GREEN)


def _logs(out: Path) -> dict[str, Path]:
    logs = {name: out / f"demo-{name}.log" for name in ("model", "vllm", "server")}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for log in logs.values():
            log.write_text("")
    except OSError as error:
        raise DemoError(f"{error}: run the demo in a directory that it may write to") from error
    return logs


def _directory(later: contextlib.ExitStack) -> Path:
    """In memory, with a path short enough for a socket; removed in the end."""
    if not os.access(MEMORY, os.W_OK):
        raise DemoError(f"{MEMORY} is not writable, expected a file system in memory: the demo needs Linux")
    free_bytes = shutil.disk_usage(MEMORY).free
    if free_bytes < SPACE_BYTES:
        raise DemoError(
            f"{MEMORY} has {free_bytes >> 20} MiB free, the demo needs {SPACE_BYTES >> 20} MiB: make room, "
            "or in Docker give it more with `--shm-size=1g`"
        )
    directory = Path(tempfile.mkdtemp(prefix="lmconnector-demo-", dir=MEMORY))
    later.callback(shutil.rmtree, directory, ignore_errors=True)
    return directory


if __name__ == "__main__":
    sys.exit(main())
