"""The probes for Kubernetes, computed from the options and from how soon the server itself tells.  Pure.

docs/kubernetes.md says why each number is what it is.
"""

import json

from cache_server.config import Config
from cache_server.detection import detection
from cache_server.values import OFF

Fields = dict[str, "Field"]
Field = str | int | list[str] | Fields

PERIOD_S = 5
READY_PERIOD_S = 2  # over HTTP: an answer costs microseconds there, a process of its own with exec
HTTP_TIMEOUT_S = 2  # it is answered from memory, within milliseconds
EXEC_TIMEOUT_S = 5  # `check` has to start first, on what CPU the container may have
LIVE_FAILURES_MIN = 3
GRACE_S = 5  # what is stuck does not drain; nothing committed is lost by ending it
START_S = 60  # of a machine that is busy with starting everything else
START_S_PER_GIB = 3  # to take over an arena full of the smallest slots; fresh memory comes faster
LOOPBACK = ("127.", "localhost", "::1", "[::1]")


class ProbeError(ValueError):
    """With these options there is nothing that the kubelet could ask."""


def probes(config: Config, *, by_exec: bool = False) -> Fields:
    """The fields of a container."""
    if not by_exec:
        _check_reachable(config.http)
    timeout_s = EXEC_TIMEOUT_S if by_exec else HTTP_TIMEOUT_S
    ready_period_s = PERIOD_S if by_exec else READY_PERIOD_S
    bounds = detection(config)
    still_s = _seconds(max(bounds.loop_still_dead_ms, bounds.process_stopped_dead_ms))
    # So many silences in a row take longer than the server takes to judge itself.
    silences = 1 + _ceil(max(0, still_s - timeout_s), PERIOD_S)
    start_s = serves_within_s(config) + _seconds(_canary_ms(config))

    def probe(path: str, word: str, period_s: int, failures: int) -> Fields:
        asked: Fields = (
            {"exec": {"command": ["cache-server", "check", f"--{word}", "--dir", config.dir]}}
            if by_exec
            else {"httpGet": {"path": path, "port": int(config.http.rpartition(":")[2])}}
        )
        return asked | {
            "periodSeconds": period_s,
            "timeoutSeconds": timeout_s,
            "failureThreshold": failures,
        }

    starting = probe(config.startup_path, "live", ready_period_s, _ceil(start_s, ready_period_s))
    living = probe(config.live_path, "live", PERIOD_S, max(LIVE_FAILURES_MIN, silences))
    return {
        "startupProbe": starting | {"terminationGracePeriodSeconds": GRACE_S},
        "livenessProbe": living | {"terminationGracePeriodSeconds": GRACE_S},
        "readinessProbe": probe(config.ready_path, "ready", ready_period_s, 1),
    }


def serves_within_s(config: Config) -> int:
    """From the process's start; who waits for it gives it up then."""
    return START_S + START_S_PER_GIB * _ceil(config.capacity, 1 << 30)


def as_yaml(fields: Fields, depth: int = 0) -> str:
    """Texts and lists as JSON has them, which YAML reads as well."""
    lines = []
    for name, value in fields.items():
        inner = f"\n{as_yaml(value, depth + 1)}" if isinstance(value, dict) else f" {json.dumps(value)}"
        lines.append(f"{'  ' * depth}{name}:{inner}")
    return "\n".join(lines)


def _canary_ms(config: Config) -> int:
    """The start ends when the canary has passed, or failed for good."""
    bounds = detection(config)
    return bounds.path_broken_ms - config.canary_idle if config.canary_idle else 0


def _check_reachable(http: str) -> None:
    if http == OFF or http.startswith(LOOPBACK) or http.endswith(":0"):
        raise ProbeError(
            f"http = {http}: the kubelet asks the pod's own address, at a port that it is told: "
            "expected 0.0.0.0:PORT or [::]:PORT, or --exec for probes that ask over no network"
        )


def _seconds(ms: int) -> int:
    return _ceil(ms, 1_000)


def _ceil(number: int, unit: int) -> int:
    return -(-number // unit)
