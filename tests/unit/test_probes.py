"""The probes for Kubernetes stand on the bounds of detection, for whatever options."""

import os
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cache_server import config as configuration
from cache_server.config import Config
from cache_server.detection import detection
from cache_server.probes import GRACE_S, ProbeError, as_yaml, probes
from cache_server.trials import TrialRules

SOME_PORT = "0.0.0.0:9470"
HTTP_P99_S = 0.005  # what is promised of an answer


def config_of(**options: str) -> Config:
    flags = {"http": SOME_PORT, **options}
    return configuration.parse(configuration.gather(flags, {}, None))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    stall_ms = draw(st.integers(500, 600_000))
    late_ms = draw(st.integers(200, max(200, min(stall_ms - 1, 300_000))))
    return config_of(
        stall_after=f"{stall_ms}ms",
        late_after=f"{late_ms}ms",
        capacity=f"{draw(st.integers(1, 65_536))}GiB",
        canary_fail_after=str(draw(st.integers(1, 100))),
        canary_idle=draw(st.sampled_from(["off", "10s", "24h"])),
    )


@given(config=configs(), by_exec=st.booleans())
def test_a_silence_ends_the_server_no_sooner_than_it_would_call_itself_stalled(
    config: Config, by_exec: bool
) -> None:
    live = probes(config, by_exec=by_exec)["livenessProbe"]
    assert isinstance(live, dict)
    period_s, timeout_s, failures = live["periodSeconds"], live["timeoutSeconds"], live["failureThreshold"]
    bounds = detection(config)
    # At the earliest: the first probe is asked as the server falls silent, all time out.
    killed_s = (failures - 1) * period_s + timeout_s
    assert killed_s * 1_000 >= max(bounds.loop_still_dead_ms, bounds.process_stopped_dead_ms)
    assert failures >= 3
    assert timeout_s <= period_s


@given(config=configs(), by_exec=st.booleans())
def test_no_silence_is_waited_for_much_longer_than_that(config: Config, by_exec: bool) -> None:
    live = probes(config, by_exec=by_exec)["livenessProbe"]
    assert isinstance(live, dict)
    stalled_s = detection(config).process_stopped_dead_ms / 1_000
    waited_s = (live["failureThreshold"] - 1) * live["periodSeconds"]
    assert waited_s <= max(stalled_s + live["periodSeconds"], 2 * live["periodSeconds"])


@given(config=configs(), by_exec=st.booleans())
def test_the_start_may_take_as_long_as_a_full_arena_and_a_failing_canary_do(
    config: Config, by_exec: bool
) -> None:
    start = probes(config, by_exec=by_exec)["startupProbe"]
    assert isinstance(start, dict)
    window_s = start["periodSeconds"] * start["failureThreshold"]
    gib = config.capacity / (1 << 30)
    slots = config.capacity // 4096
    rules: TrialRules = config.trial_rules
    run_ms = rules.deadline_ms + rules.slack_ms + rules.retry_ms
    canary_s = rules.fail_after * run_ms / 1_000 if config.canary_idle else 0
    assert window_s >= slots * 11e-6 + canary_s + 60  # docs/performance-server.md: 1.2 s for 100,352 chunks
    assert window_s >= gib + canary_s  # fresh memory: 1 GiB/s
    assert window_s <= 4 * gib + 2 * canary_s + 100


@given(config=configs(), by_exec=st.booleans())
def test_readiness_is_asked_often_and_believed_at_once(config: Config, by_exec: bool) -> None:
    """The server has judged already: a second opinion only delays it."""
    ready = probes(config, by_exec=by_exec)["readinessProbe"]
    assert isinstance(ready, dict)
    assert ready["failureThreshold"] == 1
    assert ready["periodSeconds"] <= (5 if by_exec else 2)
    assert ready["timeoutSeconds"] > 100 * HTTP_P99_S
    assert "terminationGracePeriodSeconds" not in ready  # Kubernetes refuses it there


def test_paths_and_port_are_those_of_the_options() -> None:
    config = config_of(http="0.0.0.0:80", live_path="/l", ready_path="/r", startup_path="/s")
    asked = {name: probe["httpGet"] for name, probe in probes(config).items()}
    assert asked == {
        "startupProbe": {"path": "/s", "port": 80},
        "livenessProbe": {"path": "/l", "port": 80},
        "readinessProbe": {"path": "/r", "port": 80},
    }


def test_by_exec_they_are_checks_that_need_no_http() -> None:
    config = config_of(http="off", dir="/cache/a dir")
    asked = {name: probe["exec"]["command"] for name, probe in probes(config, by_exec=True).items()}
    where = ["--dir", "/cache/a dir"]
    assert asked["livenessProbe"] == ["cache-server", "check", "--live", *where]
    assert asked["startupProbe"] == asked["livenessProbe"]
    assert asked["readinessProbe"] == ["cache-server", "check", "--ready", *where]


def test_the_defaults_are_as_documented() -> None:
    by_http, by_exec = probes(config_of()), probes(config_of(), by_exec=True)
    numbers = ("periodSeconds", "timeoutSeconds", "failureThreshold")
    assert [[by_http[name][key] for key in numbers] for name in by_http] == [[2, 2, 46], [5, 2, 3], [2, 2, 1]]
    assert [[by_exec[name][key] for key in numbers] for name in by_exec] == [[5, 5, 19], [5, 5, 3], [5, 5, 1]]
    assert by_http["livenessProbe"]["terminationGracePeriodSeconds"] == GRACE_S


@pytest.mark.parametrize("http", ["off", "127.0.0.1:9470", "localhost:1", "[::1]:9470", "0.0.0.0:0"])
def test_what_the_kubelet_cannot_reach_is_refused_with_what_to_do(http: str) -> None:
    with pytest.raises(ProbeError, match=r"expected 0\.0\.0\.0:PORT or \[::\]:PORT, or --exec"):
        probes(config_of(http=http))


@given(config=configs(), by_exec=st.booleans())
def test_what_is_printed_reads_back(config: Config, by_exec: bool) -> None:
    fields = probes(config, by_exec=by_exec)
    assert yaml.safe_load(as_yaml(fields)) == fields


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cache_server", "k8s-probes", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_the_command_prints_them_for_the_effective_options() -> None:
    said = command("--stall-after", "30s", CACHE_SERVER_HTTP=SOME_PORT)
    assert said.returncode == 0, said.stderr
    assert yaml.safe_load(said.stdout) == probes(config_of(stall_after="30s"))
    by_exec = command("--exec", "--dir", "/cache/server")
    assert yaml.safe_load(by_exec.stdout) == probes(config_of(dir="/cache/server"), by_exec=True)


def test_the_command_says_why_it_cannot() -> None:
    said = command()
    assert (said.returncode, said.stdout) == (2, "")
    assert "http = 127.0.0.1:9470" in said.stderr
