"""What is beside the chart: a runtime of KServe."""

from __future__ import annotations

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
