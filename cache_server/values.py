"""How the options' texts are read, each within its bounds; a `ValueError` tells what was expected."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path

SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
DURATIONS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}
OFF = "off"


def _quantity(text: str, units: Mapping[str, int], least: str, most: str) -> int:
    """A number with one of `units`, between two such."""
    expected = f"expected a number with a unit ({', '.join(units)}) from {least} to {most}"
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2] not in units:
        raise ValueError(expected)
    value = float(match[1]) * units[match[2]]
    if not math.isfinite(value) or not _plain(least, units) <= value <= _plain(most, units):
        raise ValueError(expected)
    return int(value)


def _plain(text: str, units: Mapping[str, int]) -> int:
    digits = text.rstrip("".join(units))
    return int(digits) * units[text[len(digits) :]]


def size(least: str, most: str) -> Callable[[str], int]:
    return lambda text: _quantity(text, SIZES, least, most)


def duration_ms(least: str, most: str) -> Callable[[str], int]:
    return lambda text: _quantity(text, DURATIONS_MS, least, most)


def percent(text: str) -> int:
    if not re.fullmatch(r"\d{1,3}", text) or not 1 <= int(text) <= 100:
        raise ValueError("expected a whole number of percent from 1 to 100")
    return int(text)


def one_of(*names: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise ValueError(f"expected one of {', '.join(names)}")
        return text

    return parse


def absolute_path(text: str) -> str:
    if not text.strip() or "\0" in text or text.encode(errors="ignore").decode() != text:
        raise ValueError("expected a path, in UTF-8")
    try:
        return str(Path(text).expanduser().absolute())
    except RuntimeError as error:  # no such user
        raise ValueError(f"expected a path: {error}") from error


def optional_path(text: str) -> str:
    return absolute_path(text) if text else ""


def address(text: str) -> str:
    if text == OFF:
        return text
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch(r"\d{1,5}", port) or int(port) > 65_535:
        raise ValueError(f"expected HOST:PORT with a port from 0 to 65535, or {OFF!r}")
    return text


def duration_ms_or_off(least: str, most: str) -> Callable[[str], int]:
    """0 stands for off."""
    return lambda text: 0 if text == OFF else _quantity(text, DURATIONS_MS, least, most)


def whole(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text) or not least <= int(text) <= most:
            raise ValueError(f"expected a whole number from {least} to {most}")
        return int(text)

    return parse


def url_path(text: str) -> str:
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", text):
        raise ValueError("expected a path such as /live: letters, digits and ._~- between slashes")
    return text


def patterns(text: str) -> tuple[str, ...]:
    """Of engines' names, with * and ?."""
    names = tuple(name.strip() for name in text.split(",")) if text.strip() else ()
    if not all(names):
        raise ValueError("expected names of engines, separated by commas; * and ? stand for any characters")
    return names


def how_many(text: str) -> str:
    if text not in ("all", "any") and not (re.fullmatch(r"\d{1,4}", text) and int(text) > 0):
        raise ValueError("expected all, any, or a whole number from 1 to 9999")
    return text
