"""The metrics that exist: a real server's, the connector's, vLLM's own."""

import contextlib
import re
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from cache_server.check import GOOD, look
from cache_server.client import Client, RefusedError
from cache_server.clock import monotonic_ms
from cache_server.config import gather, parse
from cache_server.protocol import messages as m
from lmconnector.health import State
from processes import ServerProcess, eventually, short_dir

# What the connector shows on vLLM's /metrics, with its own labels.
CONNECTOR: dict[str, set[str]] = {
    "lookups_total": {"outcome"},
    "loads_total": set(),
    "hit_tokens_total": set(),
    "load_bytes_total": set(),
    "load_seconds_total": set(),
    "store_bytes_total": set(),
    "store_seconds_total": set(),
    "chunks_stored_total": set(),
    "chunks_stored_before_total": set(),
    "drops_total": {"reason"},
    "transitions_total": {"change"},
    "hook_errors_total": {"hook"},
    "state": {"process", "state"},
    "ping_seconds": {"process"},
    "ping_mean_seconds": {"process"},
    "ping_max_seconds": {"process"},
    "copies_overdue_total": set(),
}
CONNECTOR_STATES = {state.value for state in State}
SCRAPED = {"namespace", "pod", "instance", "job", "node", "engine", "model_name"}  # by Prometheus and vLLM
SEEN_LATE = ("canary_good_seconds", "refused_total{", "request_seconds_bucket{")  # shown once there is one
WORDS = {
    "and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "offset", "bool",
    "sum", "rate", "increase", "max", "min", "avg", "count", "time", "clamp_min", "histogram_quantile",
    "avg_over_time", "max_over_time", "min_over_time", "changes", "topk", "resets", "vector",
}  # fmt: skip


class Exposition(NamedTuple):
    labels: dict[str, set[str]]  # by the sample's name
    values: dict[tuple[str, str], set[str]]  # by the sample's name and the label's


def vllm_names() -> set[str]:
    """Of the gauges, and of the counters without `_total`; the installed vLLM's."""
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "v1" / "metrics" / "loggers.py").read_text()
    return set(re.findall(r'"(vllm:\w+)"', source))


def scraped() -> Exposition:
    """Of a real server that has had something to do: a canary, and a request to refuse."""
    with short_dir() as parent:
        runtime_dir = parent / "server"
        options = ("--http", "127.0.0.1:0", "--canary-idle", "200ms", "--canary-deadline", "100ms")
        with ServerProcess(runtime_dir, *options) as server:
            server.populated()
            config = parse(gather({"dir": str(runtime_dir)}, {}, None))
            eventually(lambda: look(config, "ready", monotonic_ms()).exit_code == GOOD, "ready", 60.0)
            port = re.findall(r"listening on port (\d+)", server.log.read_text())[-1]
            with Client(runtime_dir, 10_000) as client, contextlib.suppress(RefusedError):
                client.ask(m.Release(id=1, session=0, requests=("none",)), m.Done)
            text = eventually(lambda: _text_in_full(port), "all metrics", 60.0)
    labels: dict[str, set[str]] = {}
    values: dict[tuple[str, str], set[str]] = {}
    for family in text_string_to_metric_families(text):
        labels.setdefault(family.name + ("_total" if family.type == "counter" else ""), set())
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
            for label, value in sample.labels.items():
                values.setdefault((sample.name, label), set()).add(value)
    return Exposition(labels, values)


def _text_in_full(port: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return text if all(name in text for name in SEEN_LATE) else ""


def selectors(expression: str) -> list[tuple[str, dict[str, str]]]:
    """-> each metric that it names, with what it asks of the labels"""
    found = []
    for name, matchers in re.findall(r"([a-zA-Z_:][\w:]*)\s*(\{[^}]*\})?", _without_the_rest(expression)):
        if name not in WORDS:
            found.append((name, dict(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"', matchers))))
    return found


def grouped_by(expression: str) -> set[str]:
    lists = re.findall(r"\b(?:by|without|on|ignoring|group_left)\s*\(([^)]*)\)", expression)
    return {label.strip() for each in lists for label in each.split(",") if label.strip()}


def _without_the_rest(expression: str) -> str:
    """Grouping lists, ranges and numbers with a unit name no metrics."""
    expression = re.sub(r"\b(by|without|on|ignoring|group_left)\s*\([^)]*\)", " ", expression)
    expression = re.sub(r"\[[^\]]*\]", " ", expression)
    return re.sub(r"\b[\d.]+(e\d+|[smhd])?\b", " ", expression)


def check(expression: str, server: Exposition) -> None:
    """Each metric exists, has the labels that are asked of it and, where they are few, the values."""
    named = selectors(expression)
    assert named, expression
    known_labels: set[str] = set(SCRAPED)
    for name, matchers in named:
        labels = _labels_of(name, server)
        known_labels |= labels
        assert set(matchers) <= labels | SCRAPED, f"{name} has no label {set(matchers) - labels - SCRAPED}"
        for label, wanted in matchers.items():
            _check_values(name, label, wanted, server)
    assert grouped_by(expression) <= known_labels, expression


def _labels_of(name: str, server: Exposition) -> set[str]:
    if name == "up":  # Prometheus' own
        return set()
    if name.startswith("vllm:lmconnector_"):
        short = name.removeprefix("vllm:lmconnector_")
        assert short in CONNECTOR, f"the connector has no metric {name}"
        return CONNECTOR[short]
    if name.startswith("vllm:"):
        assert {name, re.sub(r"_(total|bucket|sum|count)$", "", name)} & vllm_names(), f"vLLM has no {name}"
        return {"le"}
    assert name in server.labels, f"no server shows {name}"
    return server.labels[name]


def _check_values(name: str, label: str, wanted: str, server: Exposition) -> None:
    """A state that does not exist would be an alert that can't fire."""
    if "$" in wanted or label in SCRAPED:
        return
    if (name, label) == ("vllm:lmconnector_state", "state"):
        assert set(wanted.split("|")) <= CONNECTOR_STATES, wanted
    elif label in ("state", "part", "tier", "use", "page", "event"):
        assert set(wanted.split("|")) <= server.values.get((name, label), set()), f"{name}: {label}={wanted}"
