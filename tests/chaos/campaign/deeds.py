"""What is done to a real server, or to the connection to it, for each kind of fault of the plan."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

import other_version
from cache_server.client import RefusedError
from cache_server.protocol.presence import SOCKET
from cache_server.session import Kind, Session
from cache_server.shm import free_pages
from chaos import writer as writing
from chaos.campaign.orders import ORDERS, in_words
from chaos.campaign.plan import NONE, Step
from chaos.campaign.record import Played
from chaos.campaign.scene import Scene
from chaos.campaign.stage import CAPACITY_MIB, MIB, TABLES_MIB, Stage
from chaos.campaign.wire import Order
from processes import eventually

END_DEADLINE_S = 30.0  # of a server that drains
OTHERS = 6  # engines that together take all that may be reserved
SLOT_BYTES = MIB
PATIENT = Kind(timeout_ms=20_000)
POLICIES = ("lru", "lrfu")
LEASES = ("10s", "20s", "30s")


@dataclass
class Deed:
    stage: Stage
    engine: Mapping[str, int]  # its processes
    lasts_s: float
    random: Random

    def wait(self) -> None:
        self.stage.wait(self.lasts_s)


def play(scene: Scene, step: Step) -> Played:
    stage = scene.stage
    stage.wait(step.gap_s)
    deed = Deed(stage, scene.witness.processes, step.lasts_s, Random(step.seed))
    began_s = scene.now_s
    with_ = ORDERS[step.with_](deed.random) if step.with_ else Order()
    stage.relay.obey(with_)
    try:
        note = DEEDS[step.kind](deed) if step.kind in DEEDS else of_the_connection(step.kind, deed)
    finally:
        stage.relay.obey(Order())
    healed_s = scene.now_s
    hit_s = scene.until_a_hit()
    scene.look()
    return Played(
        step=step,
        began_s=began_s,
        healed_s=healed_s,
        hit_s=hit_s,
        note=", ".join(filter(None, [note, in_words(with_)])),
    )


def nothing(deed: Deed) -> None:
    deed.wait()


# Of the server.


def killed(deed: Deed) -> None:
    deed.stage.cache.kill()
    deed.wait()
    deed.stage.cache.start()


def restarted(deed: Deed) -> None:
    deed.stage.cache.restart()


def killed_again_and_again(deed: Deed) -> str:
    times = deed.random.randint(3, 5)
    for _ in range(times):
        deed.stage.cache.restart()
        deed.stage.wait(deed.random.uniform(0.0, 0.3))
    return f"{times} times"


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def frozen(deed: Deed) -> None:
    with stopped(deed.stage.cache.pid):
        deed.wait()


def engine_frozen(deed: Deed) -> str:
    name = deed.random.choice(sorted(deed.engine))
    with stopped(deed.engine[name]):
        deed.wait()
    return name


def end(deed: Deed) -> None:
    process = deed.stage.cache.process
    assert process is not None
    process.terminate()
    process.wait(END_DEADLINE_S)


def drained(deed: Deed) -> None:
    end(deed)
    deed.wait()
    deed.stage.cache.start()


def upgraded(deed: Deed) -> str:
    random = deed.random
    options = ["--policy", random.choice(POLICIES), "--lease", random.choice(LEASES)]
    end(deed)
    deed.stage.cache.options = [*deed.stage.base, *options]
    deed.stage.cache.start()
    return " ".join(options)


def of_another(what: str, deed: Deed) -> None:
    cache = deed.stage.cache
    end(deed)
    command = [sys.executable, other_version.__file__, what, "run", "--dir", str(cache.runtime_dir)]
    with (
        cache.log.open("ab") as log,
        subprocess.Popen([*command, *cache.options], stdout=log, stderr=log, env=cache.environment) as other,
    ):
        deed.wait()
        assert other.poll() is None, f"the server of another {what} has ended"
        other.kill()
    cache.start()


def of_another_format(deed: Deed) -> None:
    of_another("format", deed)


def of_another_protocol(deed: Deed) -> None:
    of_another("protocol", deed)


def deletes_arena(deed: Deed) -> None:
    deed.stage.arena.unlink()
    deed.wait()


def deletes_socket(deed: Deed) -> None:
    (deed.stage.cache.runtime_dir / SOCKET).unlink()
    deed.wait()


def cleared(deed: Deed) -> None:
    tell(deed.stage, "clear")


def paused(deed: Deed) -> None:
    tell(deed.stage, "pause")
    deed.wait()
    tell(deed.stage, "resume")


def tell(stage: Stage, verb: str) -> None:
    command = [sys.executable, "-m", "cache_server", verb, "--dir", str(stage.cache.runtime_dir)]
    subprocess.run(command, check=True, capture_output=True, env=stage.cache.environment)


def stuck(deed: Deed) -> None:
    """It heeds the order itself, and goes on by itself."""
    file = order(deed.stage, "loop", deed.lasts_s)
    eventually(lambda: not file.exists(), "the order is heeded")
    deed.wait()


def order(stage: Stage, part: str, seconds: float) -> Path:
    """That part of the server is to stand still; the file is gone when it does."""
    file = stage.cache.runtime_dir / f"fault.{part}"
    draft = file.with_name(f".{part}")
    draft.write_text(str(seconds))
    draft.rename(file)
    return file


# Of other engines, and of memory.


def other_worker_killed(deed: Deed) -> None:
    """In mid-write of what it has reserved."""
    seed = str(deed.random.getrandbits(32))
    ledger = os.devnull
    command = [
        sys.executable,
        writing.__file__,
        str(deed.stage.cache.runtime_dir),
        f"victim-{seed}",
        seed,
        ledger,
    ]
    with subprocess.Popen(
        [*command, "--hold"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as victim:
        assert victim.stdout is not None
        told = victim.stdout.readline()
        victim.kill()
    assert told, "the victim has not begun to write"


def arena_full(deed: Deed) -> str:
    with ExitStack() as stack:
        others = [
            Session(deed.stage.cache.runtime_dir, f"other-{number}", SLOT_BYTES, kind=PATIENT)
            for number in range(OTHERS)
        ]
        for each in others:
            stack.callback(each.abandon)
        slots = sum(take_all(each) for each in others)
        deed.wait()
    return f"{slots} MiB"


def take_all(session: Session) -> int:
    slots = 0
    with contextlib.suppress(RefusedError):
        while slots < CAPACITY_MIB:
            slots += len(session.reserve(1))
    return slots


def no_memory(deed: Deed) -> str:
    """A start without room is refused; who loses it while it starts serves with what there is."""
    stage = deed.stage
    stage.cache.kill()
    with stage.arena.open("r+b") as file:  # as `stop --purge` does
        free_pages(file.fileno())
    stage.arena.unlink()
    assert stage.mount is not None
    filler = stage.mount / "filler"
    early = deed.random.random() < 0.5
    try:
        if early:
            fill(filler)
            refused = stage.cache.launch()
            assert refused.wait(END_DEADLINE_S), "it is to say that there is no room"
            deed.wait()
        else:
            order(stage, "populate", deed.lasts_s / 2)
            stage.cache.start()
            fill(filler)
            deed.wait()
    finally:
        filler.unlink()
    if early:
        stage.cache.start()
    return "before the start" if early else "during the start"


def fill(path: Path) -> None:
    """All but what an arena's tables need."""
    with path.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(MIB)) == MIB:
                pass
        file.truncate(max(0, file.tell() - TABLES_MIB * MIB))


# Of the connection.


def of_the_connection(kind: str, deed: Deed) -> str:
    told = ORDERS[kind](deed.random)
    deed.stage.relay.obey(told)
    deed.wait()
    lost = kind == "half-open" and deed.random.random() < 0.5
    deed.stage.relay.obey(Order(close_once=lost))
    return in_words(told) + ", closed at its end" * lost


DEEDS: dict[str, Callable[[Deed], str | None]] = {
    NONE: nothing,
    "killed": killed,
    "restarted": restarted,
    "killed again and again": killed_again_and_again,
    "frozen": frozen,
    "engine frozen": engine_frozen,
    "drained": drained,
    "upgraded": upgraded,
    "of another format": of_another_format,
    "of another protocol": of_another_protocol,
    "other worker killed": other_worker_killed,
    "arena full": arena_full,
    "no memory": no_memory,
    "arena deleted": deletes_arena,
    "socket deleted": deletes_socket,
    "cleared": cleared,
    "paused": paused,
    "stuck": stuck,
}
