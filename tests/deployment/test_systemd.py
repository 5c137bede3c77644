"""systemd's unit: it grants what the server takes by default, and tries again while that can help."""

from configparser import ConfigParser
from pathlib import Path

import pytest

from cache_server.cli import EXIT_USAGE
from cache_server.config import Config, gather, parse
from cache_server.detection import detection
from cache_server.probes import probes, serves_within_s

UNIT = Path(__file__).parents[2] / "deploy" / "systemd" / "cache-server.service"
UNITS_MS = {"ms": 1, "s": 1_000}


@pytest.fixture
def unit() -> ConfigParser:
    parser = ConfigParser(interpolation=None)
    parser.optionxform = str
    parser.read_string(UNIT.read_text())
    return parser


def ms(text: str) -> int:
    digits = text.rstrip("ms")
    return int(digits) * UNITS_MS[text[len(digits) :]]


def defaults(**options: str) -> Config:
    return parse(gather(options, {}, None))


def test_it_waits_as_long_as_the_server_takes_to_call_itself_dead(unit: ConfigParser) -> None:
    assert ms(unit["Service"]["WatchdogSec"]) == detection(defaults()).process_stopped_dead_ms


def test_it_waits_for_a_drain(unit: ConfigParser) -> None:
    assert ms(unit["Service"]["TimeoutStopSec"]) > defaults().drain


def test_it_waits_for_a_start_as_the_probes_for_kubernetes_do(unit: ConfigParser) -> None:
    assert ms(unit["Service"]["TimeoutStartSec"]) == serves_within_s(defaults()) * 1_000
    without_canary = {"canary_idle": "off", "http": "0.0.0.0:9470"}
    start = probes(defaults(**without_canary))["startupProbe"]
    assert isinstance(start, dict)
    window_s = start["periodSeconds"] * start["failureThreshold"]
    assert 0 <= window_s - serves_within_s(defaults()) < start["periodSeconds"]


def test_it_starts_the_server_again_for_as_long_as_it_takes_unless_that_can_not_help(
    unit: ConfigParser,
) -> None:
    assert unit["Unit"]["StartLimitIntervalSec"] == "0", "else a few refusals are the end"
    assert unit["Service"]["Restart"] == "on-failure", "`cache-server stop` is none"
    assert ms(unit["Service"]["RestartSec"]) <= 1_000
    assert unit["Service"]["RestartPreventExitStatus"] == str(EXIT_USAGE)
