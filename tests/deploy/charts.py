"""The chart as Helm itself renders it, and what its objects say of pods, processes and their settings."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import yaml

from clockwork_serve.cli.entry import clockwork
from clockwork_serve.config import Settings, read_settings

helm = pytest.importorskip("helm_python", reason="helm-python-sdk is not installed: make setup")

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "clockwork-serve"
RELEASE, NAMESPACE = "models", "serving"
VALUES = ("small", "large")
"""The files of values beside the chart."""
MANY = re.compile(r"(\d+(?:\.\d+)?)(|[kMGT]|[KMGT]i)")
IMAGE = re.compile(r"^ENV .*?(?=^\S+ )", re.MULTILINE | re.DOTALL)
Object = dict[str, Any]


class Pod(NamedTuple):
    """A pod's specification: the kind and name of what makes it, its labels, itself."""

    kind: str
    name: str
    labels: dict[str, str]
    spec: Object

    @property
    def container(self) -> Object:
        """Its only container."""
        (found,) = self.spec["containers"]
        return dict(found)

    @property
    def role(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container.get("ports", ())}

    @property
    def volumes(self) -> dict[str, Object]:
        return {volume["name"]: volume for volume in self.spec["volumes"]}


def values_of(name: str) -> Object:
    """A file of values beside the chart."""
    found: Object = yaml.safe_load((CHART.parent / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def changed(values: Object, place: str, value: object) -> Object:
    """The same with another value at ``a.b`` or ``a.0.b``."""
    made: Any = deepcopy(values)
    *folders, last = place.split(".")
    at = made
    for each in folders:
        at = at[int(each)] if isinstance(at, list) else at.setdefault(each, {})
    at[int(last) if isinstance(at, list) else last] = value
    return dict(made)


def texts(values: Object) -> dict[str, str]:
    """What each template renders, by its file's name."""
    with helm.Chart.load(str(CHART)) as chart:
        chart.validate_schema(values)
        found = chart.render(values, name=RELEASE, namespace=NAMESPACE)
    return {Path(path).name: text for path, text in found.items()}


def rendered(values: Object) -> list[Object]:
    """All objects."""
    return [
        found
        for name, text in texts(values).items()
        if name.endswith(".yaml")
        for found in yaml.safe_load_all(text)
        if found
    ]


def named(objects: list[Object], kind: str) -> dict[str, Object]:
    """The objects of a kind by their names."""
    return {each["metadata"]["name"]: each for each in objects if each["kind"] == kind}


def pods(objects: list[Object]) -> Iterator[Pod]:
    """What each object makes pods of."""
    for each in objects:
        kind, spec = each["kind"], each.get("spec", {})
        if kind == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if kind in {"CronJob", "Job", "Deployment", "StatefulSet"}:
            template = spec["template"]
            yield Pod(kind, each["metadata"]["name"], template["metadata"]["labels"], template["spec"])


def image_environment() -> dict[str, str]:
    """The variables that the image sets."""
    (found,) = IMAGE.findall((ROOT / "Containerfile").read_text(encoding="utf-8"))
    return dict(re.findall(r"(CLOCKWORK_\w+)=(\S+)", found))


def environment_of(container: Object) -> dict[str, str]:
    """The variables of a container, the image's among them; those of Secrets and fields are left out."""
    own = {each["name"]: each["value"] for each in container.get("env", ()) if "value" in each}
    return image_environment() | own


def settings_of(container: Object, file: Path | None = None) -> Settings:
    """What ``clockwork`` understands of a container's command line, environment and ``file`` of settings."""
    arguments = [word.replace("$(POD_IP)", "10.1.2.3") for word in container["args"]]
    command = clockwork.get_command(click.Context(clockwork), arguments[0])
    assert command is not None, f"no command {arguments[0]}"
    given: Mapping[str, Any] = command.make_context(arguments[0], arguments[1:]).params
    flags = {name: value for name, value in given.items() if value not in ((), False, None)}
    config = flags.pop("config", None)
    assert (config is None) == (file is None)
    return read_settings(flags, environment_of(container), None if file is None else str(file))


def settings_file(pod: Pod, objects: list[Object], folder: Path) -> Path:
    """The file that ``--config`` of a pod's process names, as its volume holds it."""
    volume = pod.volumes["settings"]["configMap"]
    (item,) = volume["items"]
    assert f"--config=/etc/clockwork/{item['path']}" in pod.container["args"]
    text = named(objects, "ConfigMap")[volume["name"]]["data"][item["key"]]
    file = folder / f"{pod.kind}-{pod.name}.toml"
    file.write_text(text, encoding="utf-8")
    return file


def nbytes(quantity: str | int) -> int:
    """A quantity of Kubernetes in bytes."""
    found = MANY.fullmatch(str(quantity))
    assert found, quantity
    power = "kMGT".find(found[2][:1].replace("K", "k")) + 1 if found[2] else 0
    return round(float(found[1]) * (1024 if found[2].endswith("i") else 1000) ** power)
