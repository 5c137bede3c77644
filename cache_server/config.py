"""One typed configuration: flags over environment over TOML file over defaults, each with its source."""

import difflib
import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from cache_server.endpoints import Requirement
from cache_server.eviction import DEFAULT_POLICY, POLICIES
from cache_server.job import DEFAULT_JOB, Job, parse_job
from cache_server.limits import Limits
from cache_server.protocol.presence import ARENA, LOG, why_no_socket
from cache_server.protocol.slots import SLOT_ALIGN, Geometry
from cache_server.trials import TrialRules
from cache_server.values import (
    absolute_path,
    address,
    duration_ms,
    duration_ms_or_off,
    how_many,
    one_of,
    optional_path,
    patterns,
    percent,
    size,
    url_path,
    whole,
)

ENVIRONMENT_PREFIX = "CACHE_SERVER_"
ALIKE = 0.7  # as a typing error leaves two names
PATHS = ("live_path", "ready_path", "startup_path", "health_path", "events_path", "metrics_path")
DRAIN_MS_MAX = 600_000
FIXED_PATHS = ("/status",)


class ConfigError(ValueError):
    """Names the key, the value, where it came from and what was expected."""


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
    "http": Key("127.0.0.1:9470", address, "HOST:PORT of /live, /ready, /metrics …, or off"),
    "lease": Key("30s", duration_ms("1s", "10m"), "how long a LOOKUP holds what it found, if not released"),
    "silent_after": Key("5s", duration_ms("1s", "10m"), "silence after which a worker counts as silent"),
    "reclaim_grace": Key(
        "500ms", duration_ms("0ms", "1m"), "from a dead engine's end to the reuse of its slots"
    ),
    "stock_percent": Key("12", percent, "most of the arena that one engine may hold reserved"),
    "reserved_percent": Key("50", percent, "most of the arena that all engines may hold reserved"),
    "drain": Key(
        "10s", duration_ms("0s", f"{DRAIN_MS_MAX // 60_000}m"), "how long SIGTERM waits for leases to end"
    ),
    "live_path": Key("/live", url_path, "path of liveness"),
    "ready_path": Key("/ready", url_path, "path of readiness"),
    "startup_path": Key("/startup", url_path, "path that says whether the start is over"),
    "health_path": Key("/health", url_path, "path of everything about health"),
    "events_path": Key("/health/events", url_path, "path of the last changes of state"),
    "metrics_path": Key("/metrics", url_path, "path of the metrics"),
    "starting_status": Key("unready", one_of("unready", "ready"), "what readiness says during the start"),
    "late_after": Key("2s", duration_ms("200ms", "5m"), "standstill after which readiness is taken away"),
    "stall_after": Key("10s", duration_ms("500ms", "10m"), "standstill after which liveness is taken away"),
    "work_age": Key("5m", duration_ms("1s", "24h"), "age of a part's oldest work that degrades the server"),
    "pause_limit": Key("1h", duration_ms("1s", "24h"), "after which a pause ends by itself"),
    "canary_idle": Key("10s", duration_ms_or_off("100ms", "24h"), "run the canary when idle so long, or off"),
    "canary_deadline": Key("2s", duration_ms("50ms", "5m"), "of one whole run of the canary"),
    "canary_fail_after": Key("2", whole(1, 100), "failed runs in a row that take readiness away"),
    "canary_job": Key(DEFAULT_JOB, parse_job, "the canary's job, as JSON or @FILE"),
    "required_engines": Key("", patterns, "engines that readiness needs: names with * and ?, commas between"),
    "required_count": Key("all", how_many, "how many of them: all, any, or a number"),
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
    live_path: str
    ready_path: str
    startup_path: str
    health_path: str
    events_path: str
    metrics_path: str
    starting_status: str
    late_after: int
    stall_after: int
    work_age: int
    pause_limit: int
    canary_idle: int
    canary_deadline: int
    canary_fail_after: int
    canary_job: Job
    required_engines: tuple[str, ...]
    required_count: str
    group: str
    log_file: str
    log_level: str

    @property
    def runtime_dir(self) -> Path:
        return Path(self.dir)

    @property
    def arena_path(self) -> Path:
        return Path(self.arena) if self.arena else self.runtime_dir / ARENA

    @property
    def log_path(self) -> Path:
        """Of `run --daemon`."""
        return Path(self.log_file) if self.log_file else self.runtime_dir / LOG

    @property
    def limits(self) -> Limits:
        return Limits(
            lease_ms=self.lease,
            silent_after_ms=self.silent_after,
            reclaim_grace_ms=self.reclaim_grace,
            stock_bytes_max=self.capacity * self.stock_percent // 100,
            reserved_bytes_max=self.capacity * self.reserved_percent // 100,
        )

    @property
    def requirement(self) -> Requirement:
        return Requirement(self.required_engines, self.required_count)

    @property
    def canary_bytes_max(self) -> int:
        """The largest chunk that all of a canary's job can be done with."""
        each = self.limits.stock_bytes_max // self.canary_job.chunks
        return min(Geometry.of(self.capacity).slab_bytes, each // SLOT_ALIGN * SLOT_ALIGN)

    @property
    def trial_rules(self) -> TrialRules:
        return TrialRules(self.canary_idle, self.canary_deadline, self.canary_fail_after)


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


def misspelt(environment: Mapping[str, str]) -> list[str]:
    """In words.  Others begin so too: Kubernetes has some for a service that is called cache-server."""
    names = {
        variable: variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        for variable in sorted(environment)
        if variable.startswith(ENVIRONMENT_PREFIX)
    }
    return [
        f"{variable} is no option; did you mean {ENVIRONMENT_PREFIX}{near[0].upper()}?"
        for variable, name in names.items()
        if name not in KEYS and (near := difflib.get_close_matches(name, KEYS, 1, ALIKE))
    ]


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
    except OSError as error:
        raise ConfigError(f"config file {path}: {error.strerror}") from error
    except ValueError as error:
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

    if why := why_no_socket(config.runtime_dir):
        raise ConfigError(f"dir = {config.dir!r} (from {settings['dir'].source}): {why}")
    if config.stock_percent > config.reserved_percent:
        raise ConfigError(
            f"{named('stock_percent')}: expected at most {named('reserved_percent')}, which all engines share"
        )
    if config.silent_after >= config.lease:
        raise ConfigError(
            f"{named('silent_after')}: expected less than {named('lease')}, "
            "or leases end while their engine still counts as alive"
        )
    if config.late_after >= config.stall_after:
        raise ConfigError(
            f"{named('late_after')}: expected less than {named('stall_after')}: readiness goes first"
        )
    if config.canary_idle and config.canary_deadline >= config.canary_idle:
        raise ConfigError(f"{named('canary_deadline')}: expected less than {named('canary_idle')}")
    if config.required_count != KEYS["required_count"].default and not config.required_engines:
        raise ConfigError(f"{named('required_count')}: expected with it which engines, as required_engines")
    if config.canary_job.part_bytes > config.canary_bytes_max:
        raise ConfigError(
            f"{named('canary_job')}: part_bytes is {config.canary_job.part_bytes}; "
            f"with so many chunks and this capacity expected at most {config.canary_bytes_max}"
        )
    _check_paths(config, named)


def _check_paths(config: Config, named: Callable[[str], str]) -> None:
    taken = {path: f"the page {path}" for path in FIXED_PATHS}
    for name in PATHS:
        path = getattr(config, name)
        if path in taken:
            raise ConfigError(f"{named(name)}: expected a path of its own, this is {taken[path]}")
        taken[path] = named(name)
