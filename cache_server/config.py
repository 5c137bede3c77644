"""One typed configuration: flags over environment over TOML file over defaults, each with its source."""

import difflib
import math
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cache_server.eviction import DEFAULT_POLICY, POLICIES
from cache_server.limits import Limits
from cache_server.protocol.presence import LOG, SOCKET

ENVIRONMENT_PREFIX = "CACHE_SERVER_"
SOCKET_PATH_BYTES_MAX = 107  # of a unix socket's address
SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
DURATIONS_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000}
OFF = "off"


class ConfigError(ValueError):
    """Names the key, the value, where it came from and what was expected."""


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


@dataclass(frozen=True, slots=True)
class Key:
    default: str
    parse: Callable[[str], object]
    help: str


KEYS: dict[str, Key] = {
    "dir": Key("/dev/shm/cache-server", absolute_path, "runtime dir: socket, arena, locks"),  # noqa: S108
    "capacity": Key("8GiB", size("16MiB", "64TiB"), "bytes of KV cache to keep in memory, e.g. 8GiB"),
    "arena": Key("", optional_path, "arena file, if not in the runtime dir (a hugetlbfs mount, say)"),
    "policy": Key(DEFAULT_POLICY, one_of(*POLICIES), f"eviction policy: {', '.join(POLICIES)}"),
    "http": Key("127.0.0.1:9470", address, "HOST:PORT of /metrics and /status, or off"),
    "lease": Key("30s", duration_ms("1s", "10m"), "how long a LOOKUP holds what it found, if not released"),
    "silent_after": Key("5s", duration_ms("1s", "10m"), "silence after which a worker counts as silent"),
    "reclaim_grace": Key(
        "500ms", duration_ms("0ms", "1m"), "from a dead engine's end to the reuse of its slots"
    ),
    "stock_percent": Key("12", percent, "most of the arena that one engine may hold reserved"),
    "reserved_percent": Key("50", percent, "most of the arena that all engines may hold reserved"),
    "drain": Key("10s", duration_ms("0s", "10m"), "how long SIGTERM waits for leases to end"),
    "group": Key("", str, "open the runtime dir to this group, beside the server's user"),
    "log_file": Key("", optional_path, f"log of `run --daemon`; default {LOG} in the runtime dir"),
    "log_level": Key("info", one_of("debug", "info", "warning", "error"), "least severity that is logged"),
}


class Config(msgspec.Struct, frozen=True, kw_only=True):
    dir: str
    capacity: int
    arena: str
    policy: str
    http: str
    lease: int
    silent_after: int
    reclaim_grace: int
    stock_percent: int
    reserved_percent: int
    drain: int
    group: str
    log_file: str
    log_level: str

    @property
    def runtime_dir(self) -> Path:
        return Path(self.dir)

    @property
    def limits(self) -> Limits:
        return Limits(
            lease_ms=self.lease,
            silent_after_ms=self.silent_after,
            reclaim_grace_ms=self.reclaim_grace,
            stock_bytes_max=self.capacity * self.stock_percent // 100,
            reserved_bytes_max=self.capacity * self.reserved_percent // 100,
        )


@dataclass(frozen=True, slots=True)
class Setting:
    text: str
    source: str


def gather(
    flags: Mapping[str, str], environment: Mapping[str, str], config_file: Path | None
) -> dict[str, Setting]:
    """The text of every key and where it comes from."""
    from_file = _read_file(config_file) if config_file else {}
    settings: dict[str, Setting] = {}
    for name, key in KEYS.items():
        variable = ENVIRONMENT_PREFIX + name.upper()
        if name in flags:
            settings[name] = Setting(flags[name], f"--{name.replace('_', '-')}")
        elif variable in environment:
            settings[name] = Setting(environment[variable], variable)
        elif name in from_file:
            settings[name] = Setting(from_file[name], str(config_file))
        else:
            settings[name] = Setting(key.default, "default")
    return settings


def parse(settings: Mapping[str, Setting]) -> Config:
    values: dict[str, object] = {}
    for name, setting in settings.items():
        try:
            values[name] = KEYS[name].parse(setting.text)
        except ValueError as error:
            raise ConfigError(f"{name} = {setting.text!r} (from {setting.source}): {error}") from error
    config = msgspec.convert(values, Config)
    _check_together(config, settings)
    return config


def load(flags: Mapping[str, str], config_file: Path | None) -> Config:
    return parse(gather(flags, os.environ, config_file))


def _read_file(path: Path) -> dict[str, str]:
    try:
        table = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"config file {path}: {error}") from error
    for name, value in table.items():
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(KEYS)}"
            raise ConfigError(f"config file {path}: unknown key {name!r}{hint}")
        if not isinstance(value, str) and type(value) is not int:
            raise ConfigError(f"config file {path}: {name} = {value!r}: expected a text or a number")
    return {name: str(value) for name, value in table.items()}


def _check_together(config: Config, settings: Mapping[str, Setting]) -> None:
    def named(name: str) -> str:
        return f"{name} = {settings[name].text} (from {settings[name].source})"

    socket = os.fsencode(config.runtime_dir / SOCKET)
    if len(socket) > SOCKET_PATH_BYTES_MAX:
        raise ConfigError(
            f"dir = {config.dir!r} (from {settings['dir'].source}): the socket's path would have "
            f"{len(socket)} bytes, a unix socket takes {SOCKET_PATH_BYTES_MAX}: choose a shorter one"
        )
    if config.stock_percent > config.reserved_percent:
        raise ConfigError(
            f"{named('stock_percent')}: expected at most {named('reserved_percent')}, which all engines share"
        )
    if config.silent_after >= config.lease:
        raise ConfigError(
            f"{named('silent_after')}: expected less than {named('lease')}, "
            "or leases end while their engine still counts as alive"
        )
