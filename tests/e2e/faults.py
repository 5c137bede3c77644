"""What can happen to a cache server, each done to a real one for a while."""

import os
import signal
import time
from functools import partial

from cache_server.protocol.presence import ARENA
from cache_server.report import Status
from e2e import liars
from e2e.outages import Fault, Rig

STORE_S = 0.15  # in which a new prompt is computed and stored, about
KILLS = 5
FROZEN_S = 30.0
FROZEN_PACE_S = 0.5  # meanwhile
LIE_S = 2.0  # long enough to be believed, if anybody believes it


def waits(rig: Rig) -> None:
    rig.wait(2 * rig.lasts_s)


def comes_late(rig: Rig) -> None:
    rig.wait(rig.lasts_s)
    rig.cache.start()


def is_killed(rig: Rig) -> None:
    rig.cache.kill()
    comes_late(rig)


def is_killed_in_mid_load(rig: Rig) -> None:
    for _ in range(KILLS):
        rig.until(lambda status: status.leases.outstanding > 0)
        rig.cache.restart()
        rig.until_a_hit()


def is_killed_in_mid_store(rig: Rig) -> None:
    for _ in range(KILLS):
        misses: list[int] = []

        def one_more(status: Status, misses: list[int] = misses) -> bool:
            misses.append(status.counters["lookups"] - status.counters["lookup_hits"])
            return misses[-1] > misses[0]

        rig.until(one_more)
        rig.wait(rig.rng.uniform(0.0, STORE_S))
        rig.cache.restart()
        rig.until_a_hit()


def is_restarted(rig: Rig) -> None:
    rig.cache.restart()


def is_frozen(rig: Rig) -> None:
    os.kill(rig.cache.pid, signal.SIGSTOP)
    with rig.slower(FROZEN_PACE_S):
        rig.wait(FROZEN_S)
    os.kill(rig.cache.pid, signal.SIGCONT)


def loses_its_arena(rig: Rig) -> None:
    (rig.cache.runtime_dir / ARENA).unlink()
    rig.wait(rig.lasts_s)


def is_out_of_reach(rig: Rig) -> None:
    """The dir above is taken, for a server sets its own dir's mode when it starts."""
    above = rig.cache.runtime_dir.parent
    above.chmod(0)
    rig.wait(rig.lasts_s / 2)
    rig.cache.kill()
    if os.geteuid() == 0:  # else the server can't reach it either
        rig.cache.start()
        began_s = time.monotonic()
        rig.wait(rig.lasts_s)
        assert not any(one.hit and one.began_s > began_s for one in rig.traffic.asked), "it is readable"
        above.chmod(0o700)
    else:
        rig.wait(rig.lasts_s)
        above.chmod(0o700)
        rig.cache.start()


def is_of_another_version(rig: Rig) -> None:
    with rig.other_version():
        rig.wait(max(rig.lasts_s / 2, LIE_S))


def is_replaced_by_a_liar(lie: str, rig: Rig) -> None:
    with rig.liar(lie):
        rig.wait(max(rig.lasts_s / 2, LIE_S))


def of_a_liar(lie: str) -> Fault:
    """Told as the server's death, with a reason of its own, and as the liar's end."""
    return Fault(
        f"liar: {lie}",
        "in the server's place for a while",
        partial(is_replaced_by_a_liar, lie),
        told=range(1, 6) if lie == liars.WITHOUT_MEMORY else range(1, 4),
        unanswered=lie in liars.ALONE or lie == liars.WITHOUT_LOOKUPS,
    )


EACH_KILL = range(KILLS, KILLS + 1)
_ALL = [
    Fault("absent at start", "vLLM starts without a server, which comes later", comes_late, has_server=False),
    Fault("none", "nothing is done", waits, range(1)),
    Fault("killed idle", "kill -9 at a random moment, started again later", is_killed),
    Fault(
        "killed in mid-load", "kill -9 as a lease is seen, started at once", is_killed_in_mid_load, EACH_KILL
    ),
    Fault(
        "killed in mid-store", "kill -9 soon after a miss, started at once", is_killed_in_mid_store, EACH_KILL
    ),
    Fault("restarted at once", "kill -9 and start, between two pings", is_restarted),
    Fault("frozen", "SIGSTOP, later SIGCONT", is_frozen, unanswered=True),
    Fault("arena deleted", "its file is unlinked", loses_its_arena),
    Fault("dir unreadable", "chmod 000 above it, then kill -9 and start; later undone", is_out_of_reach),
    Fault("another version", "a server of another protocol version", is_of_another_version, range(1, 4)),
    *(of_a_liar(lie) for lie in (*liars.ALONE, *liars.BEFORE_A_SERVER)),
]
FAULTS = {fault.name: fault for fault in _ALL}
