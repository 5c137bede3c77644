"""The manifests: valid for Kubernetes, allowed by its security levels, and in agreement with the code."""

import json
import re
import subprocess

import kubernetes_validate
import pytest
import yaml

from cache_server import __version__
from cache_server.probes import probes
from cache_server.protocol.presence import SOCKET
from cache_server.protocol.slots import Geometry
from deployment.manifests import (
    DEPLOY,
    KUBERNETES,
    LAYOUTS,
    OVERLAYS,
    ROOT,
    Object,
    config_of,
    containers,
    environment,
    kustomization,
    named,
    objects,
    pods,
    size,
)
from deployment.names import vllm_names
from lmconnector import config as engine_config
from tools import tool

VERSIONS = ("1.29", "1.34")  # the first with sidecars, and a recent one
BASELINE_VOLUMES_REFUSED = {"hostPath"}
RESTRICTED_VOLUMES = {
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected",
    "secret",
}  # fmt: skip
PROCESS_BYTES = 512 << 20  # docs/performance-server.md: 137 MiB with 100,352 chunks
SERVERS, ENGINES = named("cache-server"), named("vllm")
ALL_PODS = [(layout, name) for layout in LAYOUTS for name in pods(layout)]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_fits_the_schemas_of_kubernetes(overlay: str, version: str) -> None:
    for each in objects(overlay):
        kubernetes_validate.validate(each, version, strict=True)


def test_the_schemas_find_a_field_that_does_not_exist() -> None:
    deployment = next(each for each in objects("sidecar") if each["kind"] == "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["path"] = "/live"
    with pytest.raises(kubernetes_validate.ValidationError, match="path"):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_kustomization_lists_all_that_is_there(overlay: str) -> None:
    listed = set(kustomization(overlay)["resources"])
    there = {path.name for path in (KUBERNETES / overlay).glob("*.yaml")}
    assert there - listed - {"prometheus-adapter.yaml"} == {"kustomization.yaml"}
    assert listed <= there
    namespace = kustomization(overlay)["namespace"]
    cluster_wide = ("Namespace", "PersistentVolume")
    assert all(
        each["metadata"].get("namespace") == namespace
        for each in objects(overlay)
        if each["kind"] not in cluster_wide
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_the_same_objects(overlay: str) -> None:
    built = subprocess.run(
        [tool("kubectl", "kubernetes-client"), "kustomize", KUBERNETES / overlay],
        capture_output=True,
        text=True,
        check=True,
    )
    by_name = {(each["kind"], each["metadata"]["name"]): each for each in yaml.safe_load_all(built.stdout)}
    assert by_name == {(each["kind"], each["metadata"]["name"]): each for each in objects(overlay)}


@pytest.mark.parametrize(("layout", "name"), ALL_PODS)
def test_a_pod_is_allowed_by_the_baseline_level(layout: str, name: str) -> None:
    pod = pods(layout)[name]
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not BASELINE_VOLUMES_REFUSED & {kind for volume in pod["volumes"] for kind in volume}
    for context in (pod["securityContext"], *(each["securityContext"] for each in containers(pod))):
        refused = {
            "privileged",
            "procMount",
            "seLinuxOptions",
            "appArmorProfile",
            "sysctls",
            "windowsOptions",
        }
        assert not refused & set(context)
        assert "add" not in context.get("capabilities", {})
        assert context.get("seccompProfile", {}).get("type") != "Unconfined"
    for container in containers(pod):
        assert not any("hostPort" in port for port in container["ports"])


@pytest.mark.parametrize(("layout", "name"), ALL_PODS)
def test_a_pod_is_allowed_by_the_restricted_level_too(layout: str, name: str) -> None:
    pod = pods(layout)[name]
    assert {kind for volume in pod["volumes"] for kind in volume} - {"name"} <= RESTRICTED_VOLUMES
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in containers(pod):
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert not {"runAsUser", "runAsNonRoot"} & set(container["securityContext"])


@pytest.mark.parametrize(("layout", "name"), ALL_PODS)
def test_a_pod_takes_no_more_than_it_needs(layout: str, name: str) -> None:
    pod = pods(layout)[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert all(each["securityContext"]["readOnlyRootFilesystem"] is True for each in containers(pod))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_server_and_engine_share_one_uid_one_volume_and_one_path(layout: str) -> None:
    [(pod, server)] = [(pod, each) for where, pod, each in SERVERS if where == layout]
    [(engine_pod, engine)] = [(pod, each) for where, pod, each in ENGINES if where == layout]

    def shared(owner: Object, container: Object) -> tuple[str, Object]:
        mount = next(each for each in container["volumeMounts"] if each["name"] == "cache")
        volume = next(each for each in owner["volumes"] if each["name"] == "cache")
        return mount["mountPath"], volume

    for key in ("runAsUser", "runAsGroup"):
        assert pod["securityContext"][key] == engine_pod["securityContext"][key]
    assert shared(pod, server) == shared(engine_pod, engine)
    runtime_dir = config_of(server).runtime_dir
    assert str(runtime_dir.parent) == shared(pod, server)[0]
    assert len(str(runtime_dir / SOCKET)) < 100
    given = json.loads(engine["args"][engine["args"].index("--kv-transfer-config") + 1])
    assert engine_config.parse(given["kv_connector_extra_config"]).dir == str(runtime_dir)
    if layout == "daemonset":  # as the scheduler has it: to the nodes that have the volume
        assert pod["nodeSelector"] == engine_pod["nodeSelector"]
        volume = next(each for each in objects(layout) if each["kind"] == "PersistentVolume")
        [term] = volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
        assert {each["key"]: each["values"][0] for each in term["matchExpressions"]} == pod["nodeSelector"]


@pytest.mark.parametrize(("layout", "pod", "container"), SERVERS, ids=LAYOUTS)
def test_the_probes_are_those_that_the_command_prints(layout: str, pod: Object, container: Object) -> None:
    printed = probes(config_of(container))
    if layout == "sidecar":  # the engine must neither wait for the server nor lose its traffic by it
        printed = {"livenessProbe": printed["livenessProbe"]}
    assert {name: value for name, value in container.items() if name.endswith("Probe")} == printed


@pytest.mark.parametrize(("layout", "pod", "container"), SERVERS, ids=LAYOUTS)
def test_there_is_time_to_drain(layout: str, pod: Object, container: Object) -> None:
    drain_s = config_of(container).drain / 1_000
    if layout == "daemonset":
        assert pod["terminationGracePeriodSeconds"] >= drain_s + 5
    else:  # it is told to end after the engine has, of the same time
        assert pod["terminationGracePeriodSeconds"] >= 2 * (drain_s + 5)
        assert container["restartPolicy"] == "Always"


@pytest.mark.parametrize(("layout", "pod", "container"), SERVERS, ids=LAYOUTS)
def test_the_memory_is_that_of_the_arena_and_the_process(layout: str, pod: Object, container: Object) -> None:
    config = config_of(container)
    file_bytes = Geometry.of(config.capacity).file_bytes
    resources = container["resources"]
    assert resources["requests"] == resources["limits"], "what is promised is there: nobody is evicted for it"
    assert size(resources["limits"]["memory"]) >= file_bytes + PROCESS_BYTES
    volume = next(each for each in pod["volumes"] if each["name"] == "cache")
    if layout == "sidecar":
        assert volume["emptyDir"]["medium"] == "Memory"
        assert size(volume["emptyDir"]["sizeLimit"]) > file_bytes
    else:
        claimed = next(each for each in objects(layout) if each["kind"] == "PersistentVolume")
        assert size(claimed["spec"]["capacity"]["storage"]) > file_bytes
        assert volume["persistentVolumeClaim"]["claimName"] == claimed["spec"]["claimRef"]["name"]


@pytest.mark.parametrize(("layout", "pod", "container"), SERVERS, ids=LAYOUTS)
def test_the_servers_variables_are_options(layout: str, pod: Object, container: Object) -> None:
    known = {f"CACHE_SERVER_{name.upper()}" for name in config_of(container).__struct_fields__}
    assert set(environment(container)) <= known
    ports = [port["containerPort"] for port in container["ports"]]
    assert ports == [int(config_of(container).http.rpartition(":")[2])]


def test_the_images_have_this_version() -> None:
    for layout in LAYOUTS:
        assert {image["newTag"] for image in kustomization(layout)["images"]} == {__version__}
        for pod in pods(layout).values():
            assert {each["image"].rpartition(":")[2] for each in containers(pod)} == {__version__}
    for name in ("server", "engine"):
        assert f":{__version__} ." in (DEPLOY / "docker" / f"{name}.Dockerfile").read_text()


def test_the_images_user_is_the_pods() -> None:
    for name, found in (("server", SERVERS), ("engine", ENGINES)):
        user = re.findall(
            r"^USER (\d+):(\d+)$", (DEPLOY / "docker" / f"{name}.Dockerfile").read_text(), re.MULTILINE
        )
        contexts = [pod["securityContext"] for _, pod, _ in found]
        assert [(str(each["runAsUser"]), str(each["runAsGroup"])) for each in contexts] == user * len(
            contexts
        )


def test_what_the_autoscaler_reads_is_what_the_adapter_makes_of_a_metric_of_vllm() -> None:
    [scaler] = objects("autoscaling")
    [rule] = yaml.safe_load((KUBERNETES / "autoscaling" / "prometheus-adapter.yaml").read_text())["rules"][
        "custom"
    ]
    assert [each["pods"]["metric"]["name"] for each in scaler["spec"]["metrics"]] == [rule["name"]["as"]]
    metric = rule["name"]["matches"]
    assert rule["seriesQuery"].startswith(metric + "{")
    assert metric in vllm_names()
    target = scaler["spec"]["scaleTargetRef"]
    for layout in LAYOUTS:
        assert (target["kind"], target["name"]) in [
            (each["kind"], each["metadata"]["name"]) for each in objects(layout)
        ]


def test_the_numbers_in_the_docs_are_those_of_the_probes() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    rows = {
        row[0]: row[2:5]
        for row in re.findall(r"^\| (\w+(?:up|ness)) " + r"\| ([^|]+) " * 4, text, re.MULTILINE)
    }
    config = config_of(SERVERS[0][2])
    by_http, by_exec = probes(config), probes(config, by_exec=True)
    for name, cells in rows.items():
        said = [[int(number) for number in re.findall(r"\d+", cell)] for cell in cells]
        for key, numbers in zip(("periodSeconds", "timeoutSeconds", "failureThreshold"), said, strict=True):
            probe = f"{name}Probe"
            assert numbers == [by_http[probe][key], by_exec[probe][key]], (name, key)
    assert set(rows) == {"startup", "liveness", "readiness"}
    live = by_http["livenessProbe"]
    silence_s = (live["failureThreshold"] - 1) * live["periodSeconds"] + live["timeoutSeconds"]
    assert f"period + timeout = {silence_s} s" in text
    assert f"{live['periodSeconds'] + silence_s} s" in text
    start = by_http["startupProbe"]
    assert f"for good: {start['periodSeconds'] * start['failureThreshold']} s." in text
