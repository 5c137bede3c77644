"""The dashboard: its queries parse, name metrics that exist, and show what matters."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployment.manifests import DEPLOY
from deployment.names import CONNECTOR, Exposition, check, grouped_by, selectors
from tools import tool

BOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in BOARD["panels"] if panel["type"] != "row"]
TARGETS = [(panel["title"], target) for panel in PANELS for target in panel["targets"]]
VARIABLES = {each["name"]: each for each in BOARD["templating"]["list"]}
SHOWN_ELSEWHERE = {"chunks_stored_total", "chunks_stored_before_total", "loads_total", "hook_errors_total"}


@pytest.mark.parametrize(("title", "target"), TARGETS, ids=[title for title, _ in TARGETS])
def test_a_query_names_only_what_exists(title: str, target: dict[str, str], server: Exposition) -> None:
    check(target["expr"], server)
    variables = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
    assert variables <= set(VARIABLES), title


@pytest.mark.parametrize(("title", "target"), TARGETS, ids=[title for title, _ in TARGETS])
def test_a_legend_names_labels_that_are_left(title: str, target: dict[str, str], server: Exposition) -> None:
    wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
    expression = target["expr"]
    left = grouped_by(expression)
    if not left:
        [(name, _)] = selectors(expression)
        left = server.labels[name] | {"instance"}
    assert wanted <= left, f"{title}: {wanted - left}"


def test_the_variables_are_filled_from_metrics_that_exist(server: Exposition) -> None:
    for name in ("server", "engine"):
        [(metric, label)] = re.findall(r"label_values\((\S+), (\w+)\)", VARIABLES[name]["definition"])
        check(metric, server)
        assert label == "instance"
        assert VARIABLES[name]["query"]["query"] == VARIABLES[name]["definition"]


def test_promtool_can_read_every_query(tmp_path: Path) -> None:
    expressions = [target["expr"].replace("$__rate_interval", "5m") for _, target in TARGETS]
    rules = [{"record": f"panel:{number}", "expr": each} for number, each in enumerate(expressions)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    done = subprocess.run(
        [tool("promtool", "prometheus"), "check", "rules", tmp_path / "rules.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_have_places_and_numbers_of_their_own() -> None:
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_panel_asks_the_data_source_that_was_chosen() -> None:
    for panel in PANELS:
        assert panel["targets"]
        for asked in (panel, *panel["targets"]):
            assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_what_matters_is_shown() -> None:
    shown = {name for _, target in TARGETS for name, _ in selectors(target["expr"])}
    wanted = {
        "state", "live", "ready", "transitions_total", "part_unmoved_seconds", "chunks_found_total",
        "arena_bytes", "evicted_chunks_total", "request_seconds_bucket", "http_seconds_bucket", "workers",
        "engines", "canary_runs_total", "canary_seconds_bucket", "canary_failures", "leases",
    }  # fmt: skip
    assert {f"cache_server_{name}" for name in wanted} <= shown
    assert {f"vllm:lmconnector_{name}" for name in set(CONNECTOR) - SHOWN_ELSEWHERE} <= shown
