"""What is beside the chart: a runtime of KServe, and a cluster of KubeRay."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from clockwork_serve.serve.http.routes import find_route
from tests.deploy import charts

kubernetes = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate is not installed: make setup"
)
DEPLOY = charts.ROOT / "deploy"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8")))


def as_pod(spec: dict[str, Any]) -> dict[str, Any]:
    """A template of a pod, as an object that Kubernetes has a schema of."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": spec}


def test_kserves_runtime_serves_what_storage_holds_at_kserves_ports() -> None:
    (runtime,) = documents("kserve/clusterservingruntime.yaml")
    (container,) = runtime["spec"]["containers"]
    settings = charts.settings_of(container)

    kubernetes.validate(as_pod({"containers": [container]}), "1.37", strict=True)
    assert runtime["spec"]["protocolVersions"] == ["v2", "grpc-v2"]
    assert container["name"] == "kserve-container"
    assert (container["workingDir"], settings.repository) == ("/mnt", "models")
    assert (settings.http_port, settings.grpc_port, settings.host) == (8080, 9000, "0.0.0.0")
    assert settings.drain_s < 30
    assert runtime["spec"]["annotations"]["prometheus.kserve.io/port"] == str(settings.metrics_port)
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[name]["httpGet"]
        assert asked["port"] == settings.http_port
        assert find_route(asked["path"].encode()) is not None


def test_rays_pods_are_kubernetes_own_and_have_what_ours_need() -> None:
    config, cluster, service = documents("ray/raycluster.yaml")
    groups = cluster["spec"]["workerGroupSpecs"]

    for each in (config, service):
        kubernetes.validate(each, "1.37", strict=True)
    for group in (cluster["spec"]["headGroupSpec"], *groups):
        spec = group["template"]["spec"]
        kubernetes.validate(as_pod(spec), "1.37", strict=True)
        assert spec["enableServiceLinks"] is False
        (container,) = spec["containers"]
        environment = charts.environment_of(container)
        assert (environment["RAY_worker_niceness"], environment["CLOCKWORK_REPOSITORY"]) == ("0", "")
        assert {mount["name"] for mount in container["volumeMounts"]} == {
            volume["name"] for volume in spec["volumes"]
        }
    assert service["spec"]["selector"]["ray.io/group"] in {group["groupName"] for group in groups}
    assert service["spec"]["selector"]["ray.io/cluster"] == cluster["metadata"]["name"]


def test_rays_nodes_are_enough_for_what_clockwork_ray_up_is_asked_for(tmp_path: Path) -> None:
    deployment = pytest.importorskip(
        "clockwork_serve.apps.ray.deployment", reason="this build has no clockwork ray"
    )
    config, cluster, _ = documents("ray/raycluster.yaml")
    file = tmp_path / "cluster.toml"
    file.write_text(config["data"]["cluster.toml"], encoding="utf-8")
    nodes = [
        deployment.Node(node_id=f"{group['groupName']}{number}", labels=group["labels"], cpus=cpus_of(group))
        for group in cluster["spec"]["workerGroupSpecs"]
        for number in range(group["replicas"])
    ]

    roles = deployment.roles_of(deployment.read_deployment(str(file)), nodes)

    assert sorted(re.sub(r"-.*", "", role.name) for role in roles) == [
        "controller", "controller", "gateway", "gateway", "worker", "worker",
    ]  # fmt: skip


def cpus_of(group: dict[str, Any]) -> float:
    (container,) = group["template"]["spec"]["containers"]
    return float(container["resources"]["requests"]["cpu"])
