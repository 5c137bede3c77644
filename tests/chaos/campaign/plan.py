"""Which faults a campaign makes, in which order, for how long: all of it follows from the seed.  Pure."""

import math
from collections.abc import Iterator
from enum import Enum
from random import Random

from msgspec import Struct

NONE = "none"
NONE_EVERY = 6  # windows in which nothing is done: what the others are compared with
GAP_S = (0.5, 3.0)  # from a recovery to the next fault
OVERLAP = 0.2  # the share of faults during which the connection is slow or lossy as well
SAME_SERVER_MAX = 3  # in a row: what goes wrong with one server again and again is trusted later and later


class After(Enum):
    """Who is there when a fault is over, as far as the engine can tell."""

    UNHURT = "nothing that an engine would notice"
    SAME = "the same server"
    NEW = "a new server"


class Found(Enum):
    """How an engine comes to know of a fault."""

    BY_CLOSED_CONNECTION = "its connection is closed"
    BY_SILENCE = "its pings are not answered"
    BY_CHANCE = "if an operation or a ping meets it"


class Fault(Struct, frozen=True):
    what: str
    lasts_s: tuple[float, float]
    after: After
    found: Found = Found.BY_CHANCE
    of_the_connection: bool = False
    needs_a_mount: bool = False


CLOSED, SILENT = Found.BY_CLOSED_CONNECTION, Found.BY_SILENCE
AT_ONCE = (0.0, 0.0)
FAULTS: dict[str, Fault] = {
    NONE: Fault("nothing is done", (2.0, 4.0), After.UNHURT),
    "killed": Fault("kill -9, started again later", (0.2, 8.0), After.NEW, CLOSED),
    "restarted": Fault("kill -9 and start at once", AT_ONCE, After.NEW, CLOSED),
    "killed again and again": Fault("3 to 5 times kill -9 and start", AT_ONCE, After.NEW, CLOSED),
    "frozen": Fault("SIGSTOP, later SIGCONT", (1.0, 40.0), After.SAME, SILENT),
    "engine frozen": Fault("SIGSTOP of one of vLLM's processes", (0.5, 5.0), After.UNHURT),
    "drained": Fault("SIGTERM, started again when it has ended", (0.1, 2.0), After.NEW),
    "upgraded": Fault("SIGTERM, then a new process with other options", AT_ONCE, After.NEW),
    "of another format": Fault(
        "SIGTERM, then one that reads no such arena; and back", (1.0, 3.0), After.NEW
    ),
    "of another protocol": Fault(
        "SIGTERM, then one that speaks no such version; and back", (1.0, 3.0), After.NEW
    ),
    "other worker killed": Fault("kill -9 of another engine in mid-write", AT_ONCE, After.UNHURT),
    "arena full": Fault("other engines hold all that can be reserved", (1.0, 4.0), After.UNHURT),
    "no memory": Fault(
        "started with a new arena and no memory for it; later freed", (1.0, 4.0), After.NEW, CLOSED,
        needs_a_mount=True,
    ),
    "arena deleted": Fault("its file is unlinked", (1.5, 3.0), After.NEW),
    "socket deleted": Fault("its file is unlinked", (1.5, 3.0), After.NEW),
    "cleared": Fault("`cache-server clear`", AT_ONCE, After.UNHURT),
    "paused": Fault("`cache-server pause`, later `resume`", (1.0, 5.0), After.SAME),
    "stuck": Fault("its loop stands still, its process runs", (1.0, 8.0), After.SAME, SILENT),
    "delay": Fault("messages take 1 to 900 ms", (2.0, 8.0), After.SAME, of_the_connection=True),
    "loss": Fault("messages are lost", (2.0, 8.0), After.SAME, of_the_connection=True),
    "duplicates": Fault("messages come twice", (2.0, 8.0), After.SAME, of_the_connection=True),
    "garbage": Fault("messages can't be decoded", (2.0, 6.0), After.SAME, of_the_connection=True),
    "torn frames": Fault("frames can't be read", (2.0, 6.0), After.SAME, of_the_connection=True),
    "trickle": Fault("a few bytes in a millisecond", (2.0, 8.0), After.SAME, of_the_connection=True),
    "half-open": Fault(
        "open, and nothing is read in one or both directions", (1.0, 12.0), After.SAME, SILENT,
        of_the_connection=True,
    ),
    "cut": Fault("closed, and closed again", (0.1, 6.0), After.SAME, CLOSED, of_the_connection=True),
}  # fmt: skip
MILD = ("delay", "loss", "duplicates", "trickle")  # those that go with another fault


class Step(Struct, frozen=True):
    number: int
    kind: str
    gap_s: float  # before it
    lasts_s: float
    seed: int  # of whatever else the deed chooses
    with_: str = ""  # a fault of the connection, at the same time


def steps(random: Random, kinds: tuple[str, ...]) -> Iterator[Step]:
    """Without end.  Every kind comes once before any comes again, but for new servers in between."""
    order = _order(random, kinds)
    number = 0
    while True:
        number += 1
        kind = NONE if number % NONE_EVERY == 1 else next(order)
        fault = FAULTS[kind]
        overlaps = kind != NONE and not fault.of_the_connection and random.random() < OVERLAP
        yield Step(
            number,
            kind,
            gap_s=round(random.uniform(*GAP_S), 2),
            lasts_s=round(log_uniform(random, *fault.lasts_s), 2),
            seed=random.getrandbits(32),
            with_=random.choice(MILD) if overlaps else "",
        )


def _order(random: Random, kinds: tuple[str, ...]) -> Iterator[str]:
    faults = [kind for kind in kinds if kind != NONE]
    healing = [kind for kind in faults if FAULTS[kind].after is After.NEW]
    assert faults
    same = 0
    while True:
        bag = random.sample(faults, len(faults))
        while bag:
            kind = bag[0]
            if same >= SAME_SERVER_MAX and healing:
                kind = next((each for each in bag if each in healing), random.choice(healing))
            if kind in bag:
                bag.remove(kind)
            after = FAULTS[kind].after
            same = 0 if after is After.NEW else same + (after is After.SAME)
            yield kind


def log_uniform(random: Random, least: float, most: float) -> float:
    """As often between 1 and 2 as between 20 and 40."""
    return math.exp(random.uniform(math.log(least), math.log(most))) if least < most else least
