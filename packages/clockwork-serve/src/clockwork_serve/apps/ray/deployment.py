"""What ``clockwork ray up`` is asked for: a file in TOML, the roles that follow from it, their command lines.

Knows nothing of Ray but what nodes and label selectors look like.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct

from clockwork_serve import __version__
from clockwork_serve.config import SETTINGS, setting
from clockwork_serve.config.former import FORMER_SETTINGS
from clockwork_serve.config.reader import former
from clockwork_serve.config.table import GATEWAY, WORKER, JoiningProcess, wrong
from clockwork_serve.config.values import Unfit, read_devices, switch
from clockwork_serve.errors import ConfigError, did_you_mean

# ------------------------------------------------------------
# The file.


Name = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]{0,30}$")]
Count = Annotated[int, Meta(ge=1, le=10_000)]
Cpus = Annotated[float, Meta(gt=0, le=1024)]


class Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[gateways]``: ``count`` in all (1), or ``per_node`` on each node that ``labels`` select."""

    count: Count | None = None
    per_node: Count | None = None
    cpus: Cpus = 0.5
    labels: dict[str, str] = {}
    settings: dict[str, Any] = {}

    def __post_init__(self) -> None:
        # To Ray a blank after a comma is a part of the value, so that "in(a, b)" would select "a" alone.
        labels = {key: re.sub(r"\s*([(,)])\s*", r"\1", wanted) for key, wanted in self.labels.items()}
        msgspec.structs.force_setattr(self, "labels", labels)


class Controllers(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[controllers]``, each on a node of its own; ``port`` is for other nodes, 0 for one that is free."""

    count: Annotated[int, Meta(ge=1, le=2)] = 1
    port: Annotated[int, Meta(ge=0, le=65535)] = 7000


class Workers(Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[[workers]]``: processes with so many ``devices`` of a kind each; ``cpus`` are a process's."""

    device: str
    devices: Annotated[int, Meta(ge=1, le=64)] = 1
    name: Name | None = None
    cpus: Cpus = 1.0

    @property
    def kind(self) -> str:
        """What its roles are called: ``cpu``, ``cuda``, ``emulated``, unless ``name`` says otherwise."""
        return self.name or self.device.partition(":")[0]


class Deployment(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. ``address`` is Ray's; empty: the cluster that this machine is a node of."""

    name: Name
    repository: str = ""
    store: Annotated[str, Meta(min_length=1)]
    address: str = ""
    controllers: Controllers = Controllers()
    gateways: Section = Section()
    workers: list[Workers]

    @property
    def parts(self) -> dict[str, Section]:
        """By the name of their tables."""
        workers = {f"workers[{number}]": one for number, one in enumerate(self.workers)}
        return {"controllers": self.controllers, "gateways": self.gateways, **workers}


def read_deployment(file: str) -> Deployment:
    """What a file says, checked. Raises :class:`ConfigError` naming field and file."""
    try:
        values = tomllib.loads(Path(file).expanduser().read_text(encoding="utf-8"))
        found = msgspec.convert(values, Deployment)
    except OSError as error:
        raise wrong("CONFIG", file, "a readable file", error.strerror, "name a TOML file") from None
    except msgspec.ValidationError as error:
        raise _misfit(str(error), values, file) from None
    except ValueError as error:
        raise wrong("CONFIG", file, "valid TOML", str(error), "correct the line it names") from None
    _check(found, file)
    found = msgspec.structs.replace(found, repository=_whole(found.repository), store=_whole(found.store))
    for name, part in found.parts.items():
        _flags(part.settings, _PROCESS[name.partition("[")[0]], f"{name}.settings", file)
    return found


def _whole(place: str) -> str:
    """A path as it is for any process of this user, wherever that runs; a URL as it is."""
    return place if not place or "://" in place else str(Path(place).expanduser().absolute())


def _misfit(said: str, values: Any, file: str) -> ConfigError:
    """What msgspec says of a value, as all errors of settings are written."""
    what, _, place = said.partition(" - at `$")
    path = re.findall(r"[^.\[\]`]+", place)
    for step in path:
        values = values[int(step)] if isinstance(values, list) else values[step]
    if named := re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", what):
        of = {"controllers": Controllers, "gateways": Section, "workers": Workers}
        fields = (of[path[0]] if path else Deployment).__struct_fields__
        field = f"{place.strip('`.')}.{named[2]}".lstrip(".")
        if named[1] == "contains unknown":
            return wrong(field, file, "a known field", named[2], did_you_mean(named[2], fields))
        return wrong(field, file, "a value", "none", f"write {named[2]} = ...")
    expected = what.partition(", got")[0].removeprefix("Expected ").replace("`", "")
    return wrong(place.strip("`."), file, expected, values, "correct it")


def _check(found: Deployment, file: str) -> None:
    """Raise :class:`ConfigError` for what concerns several fields."""
    if found.repository and found.controllers.count > 1:
        remedy = "leave the repository out: there may be 2 with the catalogue of a store"
        raise wrong("controllers.count", file, "1 with a repository", found.controllers.count, remedy)
    if not found.workers:
        raise wrong("workers", file, "one at least", "none", 'write [[workers]] with device = "cpu"')
    for name, part in found.parts.items():
        if part.per_node and (part.count or name == "controllers"):
            raise wrong(f"{name}.per_node", file, "no count beside it", part.per_node, "write one of them")
    for number, workers in enumerate(found.workers):
        try:
            kinds = read_devices(workers.device)
        except Unfit as unfit:
            raise wrong(
                f"workers[{number}].device", file, unfit.expected, workers.device, unfit.remedy
            ) from None
        if len(kinds) > 1 or kinds[0].device == workers.device:
            remedy = "leave numbers out: devices = N says how many a process has"
            raise wrong(f"workers[{number}].device", file, "a kind of device", workers.device, remedy)
    names = [one.kind for one in found.workers]
    if len(set(names)) < len(names):
        raise wrong("workers.name", file, "another name for each", ", ".join(names), "give each a name")


# ------------------------------------------------------------
# Settings that are passed on, as words of a command line.


_PROCESS: Final = {"controllers": JoiningProcess.NONE, "gateways": GATEWAY, "workers": WORKER}
_GIVEN: Final = frozenset({
    "repository", "store", "device", "controller", "machine_name", "listen_machines", "cluster_certificate",
    "cluster_key", "cluster_ca", "cluster_name", "lease",
})  # fmt: skip
"""Settings that follow from the rest of the file, or from where a role runs."""


def _flags(
    settings: Mapping[str, Any], process: JoiningProcess, where: str = "", file: str = ""
) -> tuple[str, ...]:
    """Settings of a process as words. Raises :class:`ConfigError` for one that it has not."""
    known = {entry.name for entry in SETTINGS if process in entry.elsewhere} - _GIVEN
    if old := [(name, f"{where} of {file}") for name in settings if name in FORMER_SETTINGS]:
        raise former(old)
    words = []
    for name, value in settings.items():
        if name in _GIVEN:
            remedy = "leave it out: it follows from the rest of the file"
            raise wrong(f"{where}.{name}", file, "a setting that is yours to choose", value, remedy)
        if name not in known:
            raise wrong(f"{where}.{name}", file, "a setting of that role", name, did_you_mean(name, known))
        entry = setting(name)
        try:
            entry.read(value)
        except Unfit as unfit:
            raise wrong(f"{where}.{name}", file, unfit.expected, value, unfit.remedy) from None
        if entry.read is switch:
            words.append(entry.flag if switch(value) else f"--no-{entry.flag[2:]}")
        else:
            text = ",".join(value) if isinstance(value, list) else "off" if value is False else str(value)
            words.append(f"{entry.flag}={text}")
    return tuple(words)


# ------------------------------------------------------------
# Nodes, roles, and which go where.


CONTROLLER_ROLE, GATEWAY_ROLE, WORKER_ROLE = "controller", "gateway", "worker"
NODE_ID: Final = "ray.io/node-id"
"""The label that each node of Ray has."""
ENDING_S: Final = 5.0
"""How long a process may take to end once it has drained."""


class Node(Struct, frozen=True, kw_only=True):
    """A node of Ray that is alive."""

    node_id: str
    labels: dict[str, str] = {}
    cpus: float = 0.0
    gpus: float = 0.0


class ClusterRole(Struct, frozen=True, kw_only=True):
    """One process and the actor that keeps it; what is equal in all fields needs no change.

    ``words`` is its command, but for what is known where it runs. ``number`` is its place among its kind.
    ``controllers``: how many there are. ``grace_s``: how long it may take to end.
    """

    name: str
    kind: str
    number: int
    words: tuple[str, ...]
    cpus: float
    gpus: int = 0
    labels: dict[str, str] = {}
    port: int = 0
    controllers: int = 1
    grace_s: float = 15.0
    version: str = __version__

    @property
    def devices(self) -> int:
        """How many it has, of whatever kind."""
        return sum(word.startswith("--device=") for word in self.words)


def roles_of(deployment: Deployment, nodes: Sequence[Node]) -> tuple[ClusterRole, ...]:
    """Every role, on these nodes. Raises :class:`ConfigError` if they cannot have them."""
    controllers = deployment.controllers
    fit = sum(selects(controllers.labels, node.labels) for node in nodes)
    if fit < controllers.count:
        raise _short("controllers.count", f"{controllers.count} nodes for controllers", fit)
    found = [*_roles(deployment, "controllers", controllers, controller_words(deployment), nodes)]
    found += _roles(deployment, "gateways", deployment.gateways, (GATEWAY_ROLE, "--json"), nodes)
    for one in deployment.workers:
        words = (WORKER_ROLE, *[f"--device={one.device}"] * one.devices, f"--store={deployment.store}")
        found += _roles(deployment, "workers", one, words, nodes)
    for what, wanted, there in (
        ("CPUs", sum(role.cpus for role in found), sum(node.cpus for node in nodes)),
        ("GPUs", sum(role.gpus for role in found), sum(node.gpus for node in nodes)),
    ):
        if wanted > there:
            raise _short(what.lower(), f"{wanted:g} {what} for all roles", there)
    return tuple(found)


def _roles(
    deployment: Deployment, table: str, part: Section, command: tuple[str, ...], nodes: Sequence[Node]
) -> list[ClusterRole]:
    kind = name = table.removesuffix("s")
    gpus = 0
    if isinstance(part, Workers):
        name, gpus = f"{kind}-{part.kind}", part.devices if part.device == "cuda" else 0
    fit = [node for node in nodes if selects(part.labels, node.labels) and node.gpus >= gpus]
    if not fit:
        raise _short(f"{table}.labels", f"a node with {part.labels or f'{gpus} GPUs'} for {name}", 0)
    places = [(f"{number}", part.labels) for number in range(part.count or 1)]
    if part.per_node:
        places = [
            (f"{node.node_id[:8]}-{number}", {**part.labels, NODE_ID: node.node_id})
            for node in sorted(fit, key=lambda one: one.node_id)
            for number in range(part.per_node)
        ]
    words = (*command, *_flags(part.settings, _PROCESS[table]))
    drain_s = float(part.settings.get("drain_s", setting("drain_s").default))
    return [
        ClusterRole(
            name=f"{name}-{place}", kind=kind, number=number, words=words, cpus=part.cpus, gpus=gpus,
            labels=labels, port=part.port if isinstance(part, Controllers) else 0,
            controllers=deployment.controllers.count, grace_s=drain_s + ENDING_S,
        )
        for number, (place, labels) in enumerate(places)
    ]  # fmt: skip


def _short(field: str, expected: str, found: float) -> ConfigError:
    remedy = "start nodes (ray start --address=...), or ask for less"
    return ConfigError(f"{field}: expected {expected}; found {found:g} in the Ray cluster; {remedy}")


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a node with these labels is meant: ``value``, ``in(a,b)``, and each with ``!`` before it."""
    for key, wanted in selector.items():
        plain = wanted.removeprefix("!")
        values = plain[3:-1].split(",") if re.fullmatch(r"in\(.*\)", plain) else [plain]
        if (labels.get(key) in values) is wanted.startswith("!"):
            return False
    return True


# ------------------------------------------------------------
# Devices that are wanted.


class Bundle(Struct, frozen=True, kw_only=True):
    """What Ray places a worker by: resources, and labels of the node."""

    resources: dict[str, float]
    labels: dict[str, str] = {}


def bundles_for(wanted: int, roles: Iterable[ClusterRole]) -> list[Bundle]:
    """A bundle for each worker that there would be with so many devices in all.

    It is as many of the kind that has most devices as that takes, for advice counts all devices as if they
    were of it; of other kinds, and of what a controller has itself, there is what there is.
    """
    ordered = sorted(roles, key=lambda role: role.name)
    kinds: dict[tuple[str, int], list[ClusterRole]] = {}
    for role in ordered:
        if role.kind == WORKER_ROLE:
            kinds.setdefault((f"{_bundle(role)}", role.devices), []).append(role)
    if not kinds:
        return []
    most = max(kinds.values(), key=lambda alike: sum(role.devices for role in alike))
    others = [role for role in ordered if role not in most]
    left = max(0, wanted - sum(role.devices for role in others))
    found = [_bundle(role) for role in others if role.kind == WORKER_ROLE]
    return [*found, *[_bundle(most[0])] * -(-left // most[0].devices)]


def _bundle(role: ClusterRole) -> Bundle:
    resources = {"CPU": role.cpus, **({"GPU": float(role.gpus)} if role.gpus else {})}
    return Bundle(resources=resources, labels={k: v for k, v in role.labels.items() if k != NODE_ID})


# ------------------------------------------------------------
# Command lines.


def controller_words(deployment: Deployment) -> tuple[str, ...]:
    """The command of a controller, but for what is known where it runs, and its settings.

    With a store's catalogue it is one by itself, with a repository a server that has a device of each kind.
    """
    store = f"--store={deployment.store}"
    if not deployment.repository:
        return ("controller", store, f"--lease={deployment.name}", "--json", "--metrics-port=0")
    devices = dict.fromkeys(one.device for one in deployment.workers)
    own = [f"--{port}-port=0" for port in ("http", "grpc", "metrics")]
    return ("serve", deployment.repository, store, "--json", *(f"--device={one}" for one in devices), *own)


def command_of(
    role: ClusterRole, host: str, port: int, controllers: Iterable[str], file: Callable[[str], str]
) -> list[str]:
    """The whole command, on a node of this address; ``file`` has the paths of certificate and key."""
    if role.kind == CONTROLLER_ROLE:
        place = [f"--listen-machines={joined(host, port)}"]
    else:
        place = [f"--controller={','.join(controllers)}", f"--machine-name={role.name}"]
    identity = [
        f"--cluster-certificate={file('certificate')}", f"--cluster-key={file('key')}",
        f"--cluster-ca={file('certificate')}",
    ]  # fmt: skip
    return [sys.executable, "-m", "clockwork_serve", *role.words, *place, *identity]


def joined(host: str, port: int) -> str:
    """An address with a port."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
