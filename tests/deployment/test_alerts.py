"""The alerts: they parse, fire when they should, name metrics that exist, and the runbook says what to do."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from deployment.manifests import DEPLOY, ROOT, Object, named
from deployment.names import Exposition, check, selectors
from lmconnector.config import Options
from tools import tool

PROMETHEUS = DEPLOY / "prometheus"
RULES = [
    rule
    for group in yaml.safe_load((PROMETHEUS / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
]
CASES: list[Object] = yaml.safe_load((PROMETHEUS / "alerts_test.yaml").read_text())["tests"]
INSTANCE = re.compile(r'instance="(\w+)"')
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()


def promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [tool("promtool", "prometheus"), *arguments]
    return subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True, check=False)


def test_promtool_finds_no_fault() -> None:
    done = promtool("check", "rules", "alerts.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_alerts_fire_when_they_should() -> None:
    done = promtool("test", "rules", "alerts_test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_would_have_found_an_alert_that_does_not_fire(tmp_path: Path) -> None:
    for name in ("alerts.yaml", "alerts_test.yaml"):
        text = (PROMETHEUS / name).read_text()
        (tmp_path / name).write_text(text.replace("cache_server_live == 0", "cache_server_live == 2"))
    assert promtool("test", "rules", str(tmp_path / "alerts_test.yaml")).returncode != 0


def test_every_alert_is_seen_to_fire_and_to_keep_quiet() -> None:
    """Quiet: at another time, or beside an instance that it tells."""
    fired: set[str] = set()
    quiet: set[str] = set()
    for case in CASES:
        there = {instance for each in case["input_series"] for instance in INSTANCE.findall(each["series"])}
        for expected in case["alert_rule_test"]:
            told = {each["exp_labels"]["instance"] for each in expected.get("exp_alerts", [])}
            if told:
                fired.add(expected["alertname"])
            if there - told:
                quiet.add(expected["alertname"])
    assert fired == quiet == {rule["alert"] for rule in RULES}


def test_the_alerts_are_tried_with_metrics_that_exist(server: Exposition) -> None:
    for case in CASES:
        for each in case["input_series"]:
            check(each["series"], server)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_names_only_what_exists(rule: Object, server: Exposition) -> None:
    check(rule["expr"], server)
    for annotation in rule["annotations"].values():
        assert set(re.findall(r"\$labels\.(\w+)", annotation)) <= {"instance", "state", "process", "hook"}


@pytest.mark.parametrize(
    "expression",
    [
        "cache_server_alive == 0",
        'cache_server_state{state="broken"} == 1',
        "sum by (rank) (cache_server_workers)",
        'vllm:lmconnector_state{state="dead"} == 1',
        "rate(vllm:lmconnector_drops[5m])",
        "vllm:num_requests_sleeping > 0",
    ],
)
def test_what_does_not_exist_is_found(expression: str, server: Exposition) -> None:
    with pytest.raises(AssertionError):
        check(expression, server)


def test_a_selector_is_found_in_whatever_an_expression_does() -> None:
    found = selectors(
        'sum by (le) (rate(a_bucket{x="y"}[5m])) > 0.5 * (b offset 1h or time() - 30 * c{d=~"e|f"})'
    )
    assert found == [("a_bucket", {"x": "y"}), ("b", {}), ("c", {"d": "e|f"})]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_grave_it_is_and_where_to_read_on(rule: Object) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"


def test_the_limits_that_an_alert_names_are_the_connectors() -> None:
    options = Options()
    said = {rule["alert"]: rule["annotations"]["description"] for rule in RULES}
    waits = f"wait {options.lookup_wait_ms} ms in a step and {options.lookup_deadline_ms} ms in all"
    assert waits in said["CacheServerSlow"]
    assert f"At {options.timing.timeout_ms} ms" in said["ConnectorPingSlow"]


def test_the_runbook_has_a_section_for_each_alert_and_no_other() -> None:
    section = RUNBOOK.partition("\n## Alerts\n")[2].partition("\n## ")[0]
    written = re.findall(r"^### (\w+)\n\n(.+)", section, re.MULTILINE)
    assert [name for name, _ in written] == [rule["alert"] for rule in RULES]
    described = [rule["annotations"]["description"] for rule in RULES]
    assert all(text.startswith(why[:60]) for (_, text), why in zip(written, described, strict=True))


def test_the_example_of_a_configuration_scrapes_the_containers_of_the_manifests() -> None:
    config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    assert config["rule_files"] == ["alerts.yaml"]
    jobs = {job["job_name"]: job["relabel_configs"][0]["regex"] for job in config["scrape_configs"]}
    found: dict[str, set[str]] = {}
    for _, _, container in [*named("cache-server"), *named("vllm")]:
        for port in container["ports"]:
            known = found.setdefault(container["name"], set())
            known |= {port["name"], str(port["containerPort"])}
    assert {regex.split(";")[0] for regex in jobs.values()} == set(found)
    assert all(regex.split(";")[1] in found[regex.split(";")[0]] for regex in jobs.values())
    jobs_named = {value for rule in RULES for value in re.findall(r'job="([^"]+)"', rule["expr"])}
    assert jobs_named <= set(jobs)
