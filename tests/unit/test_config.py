"""One typed configuration, each value with its source, each error with a reason."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from cache_server import config
from cache_server.config import Config, ConfigError, gather, parse
from cache_server.protocol.presence import SOCKET, SOCKET_PATH_BYTES_MAX

NOTHING: dict[str, str] = {}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def load(
    flags: Mapping[str, str] = NOTHING, environment: Mapping[str, str] = NOTHING, file: Path | None = None
) -> Config:
    return parse(gather(flags, environment, file))


def error(
    flags: Mapping[str, str] = NOTHING, environment: Mapping[str, str] = NOTHING, file: Path | None = None
) -> str:
    with pytest.raises(ConfigError) as caught:
        load(flags, environment, file)
    return str(caught.value)


def test_the_defaults_are_valid() -> None:
    loaded = load()
    assert loaded.capacity == 8 << 30
    assert loaded.lease == 30_000
    assert loaded.limits.reclaim_grace_ms == 500
    assert loaded.limits.stock_bytes_max == (8 << 30) * 12 // 100
    assert loaded.limits.reserved_bytes_max == 4 << 30


def test_a_flag_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    file = write(tmp_path / "c.toml", 'capacity = "1GiB"\nlease = "40s"\ndrain = "1s"\n')
    environment = {"CACHE_SERVER_CAPACITY": "2GiB", "CACHE_SERVER_LEASE": "50s", "PATH": "x"}
    settings = gather({"capacity": "3GiB"}, environment, file)
    loaded = parse(settings)
    assert (loaded.capacity, loaded.lease, loaded.drain, loaded.silent_after) == (
        3 << 30,
        50_000,
        1_000,
        5_000,
    )
    assert settings["capacity"].source == "--capacity"
    assert settings["lease"].source == "CACHE_SERVER_LEASE"
    assert settings["drain"].source == str(file)
    assert settings["silent_after"].source == "default"


def test_a_flag_is_named_as_it_is_typed() -> None:
    assert gather({"silent_after": "1s"}, {}, None)["silent_after"].source == "--silent-after"


@pytest.mark.parametrize(
    ("text", "capacity"),
    [
        ("16MiB", 16 << 20),
        ("1.5GiB", 3 << 29),
        (" 2 GiB ", 2 << 30),
        ("17179869184B", 16 << 30),
        ("64TiB", 64 << 40),
    ],
)
def test_sizes(text: str, capacity: int) -> None:
    assert load({"capacity": text}).capacity == capacity


@pytest.mark.parametrize(
    "text",
    ["nan", "inf", "nanGiB", "infGiB", "-8GiB", "0", "0GiB", "8GB", "8gib", "8", "8589934592", "1e3GiB", "",
     "0x10GiB", "8GiB8", " ", "GiB", "15MiB", "65TiB", "8,5GiB", "9" * 400 + "GiB", "8\nGiB GiB"],
)  # fmt: skip
def test_what_is_no_size(text: str) -> None:
    message = error({"capacity": text})
    assert message.startswith(f"capacity = {text!r} (from --capacity): expected a number with a unit")
    assert "from 16MiB to 64TiB" in message


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("lease", "30"),
        ("lease", "-1s"),
        ("lease", "nan"),
        ("lease", "0s"),
        ("lease", "11m"),
        ("lease", "1d"),
        ("lease", "30S"),
        ("reclaim_grace", "2m"),
        ("stock_percent", "0"),
        ("stock_percent", "101"),
        ("stock_percent", "-1"),
        ("stock_percent", "12.5"),
        ("stock_percent", "12%"),
        ("policy", "lfru"),
        ("log_level", "INFO"),
        ("http", "9470"),
        ("http", ":9470"),
        ("http", "127.0.0.1:"),
        ("http", "127.0.0.1:65536"),
        ("http", "127.0.0.1:-1"),
        ("dir", ""),
        ("dir", "  "),
        ("dir", "a\0b"),
        ("dir", "~nobody-has-this-name/x"),
        ("arena", "a\0b"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_source(key: str, text: str) -> None:
    variable = f"CACHE_SERVER_{key.upper()}"
    assert error(environment={variable: text}).startswith(f"{key} = {text!r} (from {variable}): expected ")


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("lease", "1500ms", 1_500),
        ("silent_after", "1s", 1_000),
        ("lease", "10m", 600_000),
        ("reclaim_grace", "0ms", 0),
        ("drain", "0s", 0),
        ("stock_percent", "1", 1),
        ("http", "off", "off"),
        ("http", "[::1]:0", "[::1]:0"),
        ("arena", "", ""),
        ("group", "vllm", "vllm"),
    ],
)
def test_a_value_within_its_bounds_is_taken(key: str, text: str, value: object) -> None:
    other = {"silent_after": "1s"} if key == "lease" else {}
    assert getattr(load({**other, key: text}), key) == value


def test_a_path_is_absolute_whatever_dir_the_server_runs_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home-of-somebody")
    assert load({"dir": "here"}).runtime_dir == tmp_path / "here"
    assert load({"dir": "~/cache"}).dir == "/home-of-somebody/cache"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('capactiy = "8GiB"', "unknown key 'capactiy'; did you mean 'capacity'?"),
        ("zzz = 1", "unknown key 'zzz'; known: dir, capacity,"),
        ('[server]\ncapacity = "8GiB"', "unknown key 'server'"),
        ("capacity = true", "capacity = True: expected a text or a number"),
        ("capacity = ['8GiB']", "capacity = ['8GiB']: expected a text or a number"),
        ("[dir]\nx = 1", "dir = {'x': 1}: expected a text or a number"),
        ("capacity = ", "Invalid value"),
        ("capacity = 8", "capacity = '8' (from "),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path / "c.toml", text)
    message = error(file=file)
    assert said in message
    assert str(file) in message


def test_a_file_that_is_missing_or_no_text_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "none.toml") in error(file=tmp_path / "none.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    assert str(tmp_path / "c.toml") in error(file=tmp_path / "c.toml")


def test_a_file_gives_numbers_as_numbers(tmp_path: Path) -> None:
    assert load(file=write(tmp_path / "c.toml", "stock_percent = 20")).stock_percent == 20


def test_a_dir_too_long_for_a_socket_is_named_with_its_source() -> None:
    fitting = "/" + "x" * (SOCKET_PATH_BYTES_MAX - len(f"//{SOCKET}"))
    assert load({"dir": fitting}).dir == fitting
    message = error({"dir": fitting + "x"})
    assert message.startswith(f"dir = {fitting + 'x'!r}")
    assert "--dir" in message
    assert "108 bytes, a unix socket takes 107" in message


def test_a_misspelt_variable_is_told_and_others_are_none_of_ours() -> None:
    names = ("CAPACITY", "CAPACITI", "CONFIG", "DEBUG_FAULTS", "PORT", "SERVICE_HOST", "PORT_9470_TCP_ADDR")
    found = config.misspelt({f"CACHE_SERVER_{name}": "x" for name in names})
    assert found == ["CACHE_SERVER_CAPACITI is no option; did you mean CACHE_SERVER_CAPACITY?"]


def test_a_dir_is_measured_in_bytes() -> None:
    assert "a unix socket takes 107" in error({"dir": "/" + "ü" * 60})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"stock_percent": "60"}, ["stock_percent", "60", "--stock-percent", "reserved_percent", "50"]),
        ({"lease": "4s"}, ["lease", "4s", "--lease", "silent_after", "5s"]),
        ({"silent_after": "2m"}, ["lease", "30s", "silent_after", "2m", "--silent-after"]),
    ],
)
def test_values_that_contradict_each_other_are_both_named_with_their_sources(
    flags: dict[str, str], words: list[str]
) -> None:
    message = error(flags)
    for word in [*words, "default", "expected"]:
        assert word in message
