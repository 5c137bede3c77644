"""What lies in deploy/, read."""

from pathlib import Path
from typing import Any

import yaml

from cache_server import config as configuration
from cache_server.config import Config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
LAYOUTS = ("daemonset", "sidecar")
OVERLAYS = (*LAYOUTS, "autoscaling")
POD_KINDS = ("DaemonSet", "Deployment")
UNITS = {"Gi": 1 << 30, "Mi": 1 << 20}

Object = dict[str, Any]


def kustomization(overlay: str) -> Object:
    return yaml.safe_load((KUBERNETES / overlay / "kustomization.yaml").read_text())


def objects(overlay: str) -> list[Object]:
    paths = [KUBERNETES / overlay / name for name in kustomization(overlay)["resources"]]
    return [each for path in paths for each in yaml.safe_load_all(path.read_text())]


def pods(overlay: str) -> dict[str, Object]:
    """The specs of pods, by the name of what makes them."""
    made = [each for each in objects(overlay) if each["kind"] in POD_KINDS]
    return {each["metadata"]["name"]: each["spec"]["template"]["spec"] for each in made}


def containers(pod: Object) -> list[Object]:
    return [*pod.get("initContainers", []), *pod["containers"]]


def named(name: str) -> list[tuple[str, Object, Object]]:
    """-> of each layout the pod with that container, and the container"""
    return [
        (layout, pod, each)
        for layout in LAYOUTS
        for pod in pods(layout).values()
        for each in containers(pod)
        if each["name"] == name
    ]


def environment(container: Object) -> dict[str, str]:
    return {each["name"]: each["value"] for each in container.get("env", [])}


def config_of(container: Object) -> Config:
    """The options that the server in it has."""
    return configuration.parse(configuration.gather({}, environment(container), None))


def size(text: str) -> int:
    return int(text[:-2]) * UNITS[text[-2:]]
