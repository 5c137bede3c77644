"""What the relay is told for each fault of the connection.  Pure."""

from collections.abc import Callable
from random import Random

from chaos.campaign.wire import CLEAN, Order, Rules


def both(rules: Rules) -> Order:
    return Order(to_server=rules, to_client=rules)


def delayed(random: Random) -> Order:
    return both(Rules(delay_ms=(1, random.choice((50, 200, 500, 900)))))


def half_open(random: Random) -> Order:
    ways = random.choice((("to_server",), ("to_client",), ("to_server", "to_client")))
    return Order(**dict.fromkeys(ways, Rules(stopped=True)))


ORDERS: dict[str, Callable[[Random], Order]] = {
    "delay": delayed,
    "loss": lambda random: both(Rules(loss=random.uniform(0.02, 0.5))),
    "duplicates": lambda random: both(Rules(duplicate=random.uniform(0.1, 1.0))),
    "garbage": lambda random: both(Rules(garble=random.uniform(0.02, 0.5))),
    "torn frames": lambda random: both(Rules(tear=random.uniform(0.02, 0.3))),
    "trickle": lambda random: both(Rules(bytes_per_ms=random.randint(1, 20))),
    "half-open": half_open,
    "cut": lambda _: Order(closed=True),
}


def in_words(order: Order) -> str:
    """What is not as usual."""
    found: dict[str, list[str]] = {}
    for way in ("to_server", "to_client"):
        rules = getattr(order, way)
        for name in Rules.__struct_fields__:
            if (value := getattr(rules, name)) != getattr(CLEAN, name):
                found.setdefault(f"{name} {_short(value)}".rstrip(), []).append(way.replace("_", " "))
    return ", ".join(f"{what} {' and '.join(ways)}" for what, ways in found.items())


def _short(value: object) -> str:
    if value is True:
        return ""
    return f"{value:.2f}" if isinstance(value, float) else str(value)
