"""The options of `kv_connector_extra_config`: typed, checked, and logged once."""

import difflib
import logging
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from cache_server.protocol.presence import why_no_socket
from lmconnector.errors import ConfigError
from lmconnector.timing import Timing

log = logging.getLogger(f"vllm.{__name__}")

Seconds = Annotated[float, Meta(ge=0.05, le=3600)]
Milliseconds = Annotated[int, Meta(ge=0, le=60_000)]


class Options(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    dir: Annotated[str, Meta(min_length=1)] = "/dev/shm/cache-server"  # noqa: S108  the server's runtime dir
    chunk_tokens: Annotated[int, Meta(ge=1, le=65_536)] = 256  # what is stored and found as one
    heartbeat_interval_s: Seconds = 1.0
    heartbeat_timeout_s: Seconds = 0.5  # after which a ping counts as unanswered
    fail_after: Annotated[int, Meta(ge=2, le=100)] = 3  # unanswered pings in a row
    lookup_wait_ms: Milliseconds = 2  # longest a scheduler step waits for a lookup
    # Longest a request waits for a lookup.  With less than a busy machine's turn each would be late, and each
    # late one shuts the gate until the next pong.
    lookup_deadline_ms: Annotated[int, Meta(ge=5, le=60_000)] = 100
    # Of everything else that is asked; copies begin within it.  With less no registration would succeed.
    request_deadline_ms: Annotated[int, Meta(ge=50, le=60_000)] = 2_000
    sync_load_ms: Annotated[float, Meta(ge=0, le=60_000)] = 10.0  # longer loads run beside the steps
    store_decode: bool = False  # cache generated tokens too, not only prompts
    stock_slots: Annotated[int, Meta(ge=1, le=4_096)] = 64  # slots kept ready for stores, per cache group

    @property
    def timing(self) -> Timing:
        return Timing(
            interval_ms=round(1_000 * self.heartbeat_interval_s),
            timeout_ms=round(1_000 * self.heartbeat_timeout_s),
            fail_after=self.fail_after,
        )


KINDS = typing.get_type_hints(Options, include_extras=True)


def parse(given: Mapping[str, object]) -> Options:
    known = Options.__struct_fields__
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"kv_connector_extra_config: unknown key {name!r}{hint}")
        _check(name, given[name])
    options = msgspec.convert(dict(given), Options)
    options = msgspec.structs.replace(options, dir=_whole_path(options.dir))
    if options.heartbeat_timeout_s > options.heartbeat_interval_s:
        raise ConfigError(
            f"kv_connector_extra_config: heartbeat_timeout_s = {options.heartbeat_timeout_s}: expected at "
            f"most heartbeat_interval_s = {options.heartbeat_interval_s}"
        )
    if options.lookup_wait_ms > options.lookup_deadline_ms:
        raise ConfigError(
            f"kv_connector_extra_config: lookup_wait_ms = {options.lookup_wait_ms}: expected at most "
            f"lookup_deadline_ms = {options.lookup_deadline_ms}"
        )
    return options


def _whole_path(text: str) -> str:
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:  # no such user
        raise ConfigError(f"kv_connector_extra_config: dir = {text!r}: {error}") from error
    if not path.is_absolute():
        why = "expected a path from the root: server and engines have working directories of their own"
        raise ConfigError(f"kv_connector_extra_config: dir = {text!r}: {why}")
    if why := why_no_socket(path):
        raise ConfigError(f"kv_connector_extra_config: dir = {text!r}: {why}")
    return str(path)


def _check(name: str, value: object) -> None:
    """By itself, for msgspec's words of all of them would not tell the value."""
    try:
        msgspec.convert(value, KINDS[name])
    except msgspec.ValidationError as error:
        raise ConfigError(f"kv_connector_extra_config: {name} = {value!r}: {error}") from error


def log_options(options: Options) -> None:
    defaults = Options()
    words = [
        f"{name}={getattr(options, name)}"
        + (
            ""
            if getattr(options, name) == getattr(defaults, name)
            else f" (default {getattr(defaults, name)})"
        )
        for name in options.__struct_fields__
    ]
    log.info(
        "options: %s; a hung server is left after %d ms at most",
        ", ".join(words),
        options.timing.hang_found_within_ms,
    )
