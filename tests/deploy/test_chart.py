"""The Helm chart: its objects are Kubernetes' own, and their processes are ones that ``clockwork`` starts."""

from __future__ import annotations

import base64
import re
import shutil
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from clockwork_serve.config import SETTINGS
from clockwork_serve.serve.http.routes import find_metrics_route, find_route
from clockwork_serve.serve.remote.config import ClusterFiles, context_of
from clockwork_serve.units import MIB
from tests.deploy import charts
from tests.deploy.charts import Object, Pod, named

kubernetes = pytest.importorskip(
    "kubernetes_validate", reason="kubernetes-validate is not installed: make setup"
)
SCHEMAS = ("1.30", "1.37")
"""The oldest version of Kubernetes that the chart allows, and the newest whose schemas are there."""
OTHERS = ("cert-manager.io/", "monitoring.coreos.com/")
"""Whose objects Kubernetes has no schema of."""
NEVER_SET = {"repository", "controllers", "machine_name"}
"""Settings that make no sense in a pod."""
FILES = {"/etc/clockwork", "/certificates", "/keys", "/tls", "/cache", "/store", "/models"}


@pytest.fixture(scope="module", params=charts.VALUES)
def objects(request: pytest.FixtureRequest) -> list[Object]:
    return charts.rendered(charts.values_of(request.param))


@pytest.fixture
def pods(objects: list[Object]) -> list[Pod]:
    return list(charts.pods(objects))


# Helm and Kubernetes


@pytest.mark.parametrize("name", charts.VALUES)
def test_helm_finds_nothing_to_say(name: str) -> None:
    found = charts.helm.lint(str(charts.CHART), charts.values_of(name), strict=True, kube_version="v1.30.0")

    assert [each for each in found["messages"] if each["severity"] > 1] == [], "warnings and errors"


@pytest.mark.parametrize("version", SCHEMAS)
def test_every_object_is_what_kubernetes_expects(objects: list[Object], version: str) -> None:
    core = [each for each in objects if not each["apiVersion"].startswith(OTHERS)]

    for each in core:
        kubernetes.validate(each, version, strict=True)
    assert {each["kind"] for each in core} >= {"StatefulSet", "Deployment", "Service", "Job", "CronJob"}


def test_names_are_unique_and_short_enough(objects: list[Object]) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    long = charts.rendered(
        charts.changed(charts.values_of("small"), "workers.0.name", "a-name-of-15-ab")
        | {"fullnameOverride": "clockwork-of-a-department-with-a-long-name"}
    )

    assert len(names) == len({*names})
    for kind, name in [*names, *((each["kind"], each["metadata"]["name"]) for each in long)]:
        assert len(name) <= (52 if kind in {"CronJob", "StatefulSet"} else 63), name


def test_selectors_find_pods_of_their_role_alone(objects: list[Object], pods: list[Pod]) -> None:
    for each in objects:
        if each["kind"] not in {"Service", "PodDisruptionBudget", "Deployment", "StatefulSet", "PodMonitor"}:
            continue
        selector = each["spec"]["selector"]
        wanted = selector.get("matchLabels", selector).items()
        found = {pod.role for pod in pods if wanted <= pod.labels.items()}
        assert len(found) == 1, each["metadata"]["name"]
        if each["kind"] == "Service":
            ports = next(pod.ports for pod in pods if pod.role in found)
            assert {port["targetPort"] for port in each["spec"]["ports"]} <= {*ports}


# Processes


def test_every_command_line_is_one_that_the_command_takes(
    objects: list[Object], pods: list[Pod], tmp_path: Path
) -> None:
    for pod in pods:
        settings = charts.settings_of(pod.container, charts.settings_file(pod, objects, tmp_path))
        assert not settings.warnings, settings.warnings
        assert settings.log_format == "json"
        if pod.role == "builder":
            assert settings.repository == ("/models" if settings.store == "/store" else "/models/repository")
        else:
            assert settings.repository == ""
    assert {pod.role for pod in pods} == {"controller", "gateway", "worker", "builder"}


def test_workers_and_gateways_find_the_controllers(objects: list[Object], pods: list[Pod]) -> None:
    (controllers,) = named(objects, "StatefulSet").values()
    service = named(objects, "Service")[controllers["spec"]["serviceName"]]
    (listening,) = [pod for pod in pods if pod.role == "controller"]
    addresses = ",".join(
        f"{controllers['metadata']['name']}-{number}.{service['metadata']['name']}:7000"
        for number in range(controllers["spec"]["replicas"])
    )

    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"]
    assert listening.ports["machines"] == 7000
    assert "--listen-machines=$(POD_IP):7000" in listening.container["args"]
    for pod in pods:
        if pod.role in {"gateway", "worker"}:
            assert f"--controller={addresses}" in pod.container["args"]


def test_all_work_on_one_store_and_under_one_name(objects: list[Object], pods: list[Pod]) -> None:
    stores = {word for pod in pods for word in pod.container["args"] if word.startswith("--store=")}
    names = {word for pod in pods for word in pod.container["args"] if word.startswith("--cluster-name=")}

    assert len(stores) == 1
    assert names == {"--cluster-name=models-clockwork.serving"}
    for each in named(objects, "Certificate").values():
        assert each["spec"].get("isCA") or each["spec"]["dnsNames"] == ["models-clockwork.serving"]


def test_files_that_a_process_is_given_are_mounted(objects: list[Object], pods: list[Pod]) -> None:
    for pod in pods:
        mounts = {mount["mountPath"]: mount["name"] for mount in pod.container["volumeMounts"]}
        wanted = {
            found[1]
            for word in pod.container["args"]
            if (found := re.search(r"(?:^|=)(/[a-z]+(?:/clockwork(?=/))?)", word))
        }
        assert wanted <= FILES
        assert wanted <= {*mounts}, pod.name
        assert {*mounts.values()} == {*pod.volumes}, pod.name
        if "store" in pod.volumes:
            claim = pod.volumes["store"]["persistentVolumeClaim"]["claimName"]
            assert claim in named(objects, "PersistentVolumeClaim")


def test_probes_ask_what_is_answered_at_ports_that_are_open(pods: list[Pod]) -> None:
    for pod in pods:
        probes = {name: probe for name, probe in pod.container.items() if name.endswith("Probe")}
        assert (not probes) == (pod.role in {"worker", "builder"}), pod.name
        for name, probe in probes.items():
            asked = probe["httpGet"]
            find = find_metrics_route if asked["port"] == "metrics" else find_route
            assert asked["port"] in pod.ports
            route = find(asked["path"].encode())
            assert route is not None, asked
            # Models may be compiled for hours before it is ready: nothing but a reader may wait for that.
            assert asked["path"].endswith("live") or name == "readinessProbe"


def test_a_pod_has_time_to_finish_what_waits(objects: list[Object], pods: list[Pod], tmp_path: Path) -> None:
    for pod in pods:
        settings = charts.settings_of(pod.container, charts.settings_file(pod, objects, tmp_path))
        before = pod.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        more = 25 if pod.role == "controller" else 2  # five seconds for each kind of process; its own end
        if pod.role != "builder":
            assert pod.spec["terminationGracePeriodSeconds"] >= settings.drain_s + before + more
        assert (before > 0) == (pod.role == "gateway")


def test_memory_is_enough_for_what_the_settings_say(
    objects: list[Object], pods: list[Pod], tmp_path: Path
) -> None:
    for pod in pods:
        settings = charts.settings_of(pod.container, charts.settings_file(pod, objects, tmp_path))
        resources = pod.container["resources"]
        limit = charts.nbytes(resources["limits"]["memory"])
        shared = pod.volumes["shm"]["emptyDir"]
        assert charts.nbytes(resources["requests"]["memory"]) <= limit
        assert shared["medium"] == "Memory"
        room = charts.nbytes(shared["sizeLimit"])
        match pod.role:
            case "gateway":
                room += settings.gateways * 2 * settings.gateway_memory
                assert pod.ports.keys() >= {f"tensors-{number}" for number in range(settings.gateways)}
            case "worker" | "builder" if settings.device[0].kind == "cuda":
                room += len(settings.device) * (settings.host_memory + 2 * settings.io_memory)
                assert resources["limits"]["nvidia.com/gpu"] == len(settings.device)
            case "worker" | "builder":
                assert isinstance(settings.device_memory, int)
                each = settings.device_memory + settings.workspace + 2 * settings.io_memory
                room += len(settings.device) * each
                assert "nvidia.com/gpu" not in resources["limits"]
        assert limit >= room + 250 * MIB, pod.name


def test_pods_have_no_right_that_they_do_not_need(pods: list[Pod]) -> None:
    for pod in pods:
        context = pod.spec["securityContext"]
        assert pod.spec["enableServiceLinks"] is False
        assert pod.spec["automountServiceAccountToken"] is False
        assert (context["runAsNonRoot"], context["seccompProfile"]) == (True, {"type": "RuntimeDefault"})
        for container in (pod.container, *pod.spec.get("initContainers", ())):
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"]
            assert (own["allowPrivilegeEscalation"], own["capabilities"]) == (False, {"drop": ["ALL"]})
        for volume in pod.volumes.values():
            if "secret" in volume:  # keys that others may write are refused, those that they may read told of
                assert volume["secret"]["defaultMode"] == 0o440
        assert [mount["name"] for mount in pod.container["volumeMounts"] if mount.get("readOnly")] != []


def test_what_compiles_or_runs_models_is_on_cpus_of_one_kind_and_alone_knows_the_store() -> None:
    pods = list(charts.pods(charts.rendered(charts.values_of("large"))))
    places = {str(pod.spec.get("nodeSelector")) for pod in pods if pod.role != "gateway"}

    assert len(places) == 1
    for pod in pods:
        assert ("envFrom" in pod.container) == (pod.role != "gateway")
        if "--device=cuda" in pod.container["args"]:
            assert pod.spec["tolerations"]


def test_other_settings_are_another_builder_and_restart_pods() -> None:
    small = charts.values_of("small")
    before = charts.rendered(small)
    after = charts.rendered(charts.changed(small, "settings", {"max_batch": 8}))

    assert named(before, "Job").keys().isdisjoint(named(after, "Job"))
    assert named(before, "CronJob").keys() == named(after, "CronJob").keys()
    for kind in ("Deployment", "StatefulSet"):
        for name, each in named(before, kind).items():
            assert each["spec"]["template"] != named(after, kind)[name]["spec"]["template"]


# Certificates


def test_certificates_that_helm_makes_are_good_for_both_sides(tmp_path: Path) -> None:
    (secret,) = named(charts.rendered(charts.values_of("small")), "Secret").values()
    for name, content in secret["data"].items():
        (tmp_path / name).write_bytes(base64.b64decode(content))
    files = ClusterFiles(
        certificate=str(tmp_path / "tls.crt"), key=str(tmp_path / "tls.key"), ca=str(tmp_path / "ca.crt"),
        name="models-clockwork.serving",
    )  # fmt: skip
    inward, outward = ssl.MemoryBIO(), ssl.MemoryBIO()
    asking = context_of(files, server=False).wrap_bio(inward, outward, server_hostname=files.name)
    answering = context_of(files, server=True).wrap_bio(outward, inward, server_side=True)

    waiting: list[ssl.SSLObject] = [asking, answering]
    for _ in range(10):
        waiting = [each for each in waiting if not shaken(each)]
    assert waiting == []
    assert ("DNS", files.name) in answering.getpeercert()["subjectAltName"]  # type: ignore[index]


def shaken(side: ssl.SSLObject) -> bool:
    try:
        side.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


# Monitoring


def test_the_rules_are_those_of_the_examples(tmp_path: Path) -> None:
    (rules,) = named(charts.rendered(charts.values_of("large")), "PrometheusRule").values()
    original = charts.ROOT / "examples" / "monitoring" / "clockwork.rules.yml"

    assert rules["spec"] == yaml.safe_load(original.read_text(encoding="utf-8"))
    if shutil.which("promtool"):
        (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules["spec"]), encoding="utf-8")
        check = ["promtool", "check", "rules", tmp_path / "rules.yml"]
        subprocess.run(check, check=True, capture_output=True)


def test_workers_are_as_many_as_the_server_wants_where_that_is_asked_for() -> None:
    values = charts.changed(charts.values_of("small"), "workers.0.autoscaling", {"maxReplicas": 8})
    values = charts.changed(values, "workers.0.devices", 2)
    objects = charts.rendered(charts.changed(values, "settings.scaling_target", 0.999))
    (scaler,) = named(objects, "HorizontalPodAutoscaler").values()
    worker = named(objects, "Deployment")[scaler["spec"]["scaleTargetRef"]["name"]]
    (metric,) = scaler["spec"]["metrics"]
    text = (charts.ROOT / "docs" / "operate" / "metrics.md").read_text(encoding="utf-8")

    for version in SCHEMAS:
        kubernetes.validate(scaler, version, strict=True)
    assert "replicas" not in worker["spec"], "an upgrade of the chart leaves their number alone"
    assert (scaler["spec"]["minReplicas"], scaler["spec"]["maxReplicas"]) == (1, 8)
    assert f"`{metric['external']['metric']['name']}`" in text
    assert metric["external"]["target"] == {"type": "AverageValue", "averageValue": "2"}, "devices of a pod"


def test_what_is_scraped_is_one_server_with_all_its_gateways() -> None:
    objects = charts.rendered(charts.values_of("large"))
    (config,), (monitor,) = named(objects, "ScrapeConfig").values(), named(objects, "PodMonitor").values()
    (whole,), (each,) = config["spec"]["staticConfigs"], monitor["spec"]["podMetricsEndpoints"]
    (target,) = whole["targets"]
    (dropped,) = config["spec"]["metricRelabelings"]
    kept, *labels = each["metricRelabelings"]
    service = named(objects, "Service")[target.partition(".")[0]]

    assert target == f"{service['metadata']['name']}.serving.svc:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["publishNotReadyAddresses"], "it tells that it is not ready"
    assert {one["targetLabel"]: one["replacement"] for one in labels} == {
        "job": whole["labels"]["job"], "instance": target,
    }  # fmt: skip
    assert (dropped["action"], kept["action"], dropped["regex"]) == ("drop", "keep", kept["regex"])
    rules = (charts.ROOT / "examples" / "monitoring" / "clockwork.rules.yml").read_text(encoding="utf-8")
    assert f'up{{job="{whole["labels"]["job"]}"}}' in rules


def test_policies_let_through_what_the_pods_need() -> None:
    objects = charts.rendered(charts.values_of("large"))
    pods = list(charts.pods(objects))
    for policy in named(objects, "NetworkPolicy").values():
        wanted = policy["spec"]["podSelector"]["matchLabels"].items()
        chosen = [pod for pod in pods if wanted <= pod.labels.items()]
        assert chosen
        for rule in policy["spec"]["ingress"]:
            for port in rule["ports"]:
                first = port["port"]
                if isinstance(first, int):
                    open_ports = {*range(first, port["endPort"] + 1)}
                    assert open_ports == {
                        number for name, number in chosen[0].ports.items() if name.startswith("tensors")
                    }
                else:
                    assert first in chosen[0].ports
    assert {*named(objects, "NetworkPolicy")} == {
        f"models-clockwork-{role}" for role in ("controller", "gateway", "worker", "builder")
    }


# Values


def test_the_settings_that_values_may_have_are_all_but_those_that_the_chart_sets() -> None:
    schema = yaml.safe_load((charts.CHART / "values.schema.json").read_text(encoding="utf-8"))
    objects = charts.rendered(charts.changed(charts.values_of("large"), "gateway.tls.clientCA", value=True))
    given = {
        word.partition("=")[0].removeprefix("--").replace("-", "_")
        for pod in charts.pods(objects)
        for word in pod.container["args"]
    } - {"trusted_hosts"}

    allowed = {*schema["definitions"]["settings"]["propertyNames"]["enum"]}
    assert allowed == {entry.name for entry in SETTINGS} - given - NEVER_SET


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("gateway.replicas", "two", "/gateway/replicas"),
        ("gateway.proceses", 2, "proceses"),
        ("settings", {"max_bach": 8}, "max_bach"),
        ("settings", {"store": "/elsewhere"}, "store"),
        ("workers.0.device", "gpu", "/workers/0/device"),
        ("workers.0.settings", {"device_memory": "lots"}, "workers[0].settings.device_memory: expected"),
        ("workers.0.resources", {"limits": {"memory": "512Mi"}}, "workers[0].resources.limits.memory: "),
        ("gateway.settings", {"gateway_memory": "8GiB"}, "gateway.resources.limits.memory: "),
        ("builders.resources", {"limits": {"memory": "1Gi"}}, "builders.resources.limits.memory: expected"),
        ("controller.resources", {"limits": {"memory": "100M"}}, "controller.resources.limits.memory"),
        ("sharedMemory", "much", "/sharedMemory"),
        ("store.url", "models", "/store/url"),
        ("models.volume", {"emptyDir": {}, "nfs": {}}, "/models/volume"),
        ("certificates", {"secretName": "a", "certManager": {"enabled": True}}, "certificates: expected"),
    ],
)
def test_a_value_that_is_wrong_is_named(place: str, value: Any, said: str) -> None:
    values = charts.values_of("small")
    if place == "gateway.settings":
        values = charts.changed(values, "gateway.resources", {"limits": {"memory": "2Gi"}})

    with pytest.raises(charts.helm.HelmError) as caught:
        charts.rendered(charts.changed(values, place, value))

    assert said in str(caught.value)


def test_what_is_said_after_an_installation_names_what_is_there() -> None:
    said = charts.texts(charts.values_of("small")).get("NOTES.txt")
    if said is None:
        pytest.skip("this Helm renders no notes")

    assert "service/models-clockwork 8000:8000" in said
    assert "cronjob/models-clockwork-build-cpu" in said
