"""A deployment's file, the roles that follow from it on some nodes, and their command lines. Without Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import pytest

from clockwork_serve.apps.ray.deployment import (
    NODE_ID,
    Bundle,
    ClusterRole,
    Deployment,
    Node,
    Section,
    bundles_for,
    command_of,
    read_deployment,
    roles_of,
    selects,
)
from clockwork_serve.cli.entry import clockwork
from clockwork_serve.errors import ConfigError

LARGE = """
name = "shop"
store = "s3://models/shop"

[controllers]
count = 2
labels = {disk = "fast"}
settings = {slo_ms = 50, max_batch = 8}

[gateways]
per_node = 1
labels = {front = "yes"}
settings = {host = "0.0.0.0", model_control = false, shared_memory = false, trusted_hosts = ["a.example"]}

[[workers]]
device = "cuda"
devices = 2
count = 3
labels = {"ray.io/accelerator-type" = "in(A100, H100)"}
settings = {drain_s = 3}

[[workers]]
device = "emulated:flat"
name = "try"
per_node = 2
labels = {front = "!yes"}
"""


def node(node_id: str, gpus: float = 0, cpus: float = 8, **labels: str) -> Node:
    return Node(node_id=node_id, cpus=cpus, gpus=gpus, labels=labels)


A100 = {"ray.io/accelerator-type": "A100"}
NODES = (
    node("a" * 56, disk="fast", front="yes"),
    node("b" * 56, gpus=8, disk="fast", **A100),
    node("c" * 56, front="yes"),
)


def deployment(folder: Path, text: str) -> Deployment:
    file = folder / "shop.toml"
    file.write_text(text)
    return read_deployment(str(file))


def large(folder: Path) -> dict[str, ClusterRole]:
    return {role.name: role for role in roles_of(deployment(folder, LARGE), NODES)}


def test_roles_are_those_of_the_file_on_the_nodes_that_labels_select(tmp_path: Path) -> None:
    found = large(tmp_path)

    assert list(found) == [
        "controller-0", "controller-1", "gateway-aaaaaaaa-0", "gateway-cccccccc-0", "worker-cuda-0",
        "worker-cuda-1", "worker-cuda-2", "worker-try-bbbbbbbb-0", "worker-try-bbbbbbbb-1",
    ]  # fmt: skip
    assert found["gateway-cccccccc-0"].labels == {"front": "yes", NODE_ID: "c" * 56}
    assert found["worker-cuda-1"].labels == {"ray.io/accelerator-type": "in(A100,H100)"}
    assert [role.gpus for role in found.values()] == [0, 0, 0, 0, 2, 2, 2, 0, 0]
    assert found["controller-1"].port == 7000
    assert found["worker-cuda-0"].grace_s == 8.0


def test_equal_files_and_nodes_give_equal_roles_in_any_order_of_nodes(tmp_path: Path) -> None:
    found = deployment(tmp_path, LARGE)

    assert roles_of(found, NODES) == roles_of(found, NODES[::-1])


def test_a_node_that_joins_gets_its_part_and_changes_no_other(tmp_path: Path) -> None:
    found = deployment(tmp_path, LARGE)
    more = roles_of(found, [*NODES, node("d" * 56, front="yes")])

    assert {role.name for role in more} - {*large(tmp_path)} == {"gateway-dddddddd-0"}
    assert [role for role in roles_of(found, NODES) if role not in more] == []


def test_wanted_devices_are_workers_of_the_kind_with_most(tmp_path: Path) -> None:
    roles = large(tmp_path).values()
    cuda = Bundle(resources={"CPU": 1.0, "GPU": 2.0}, labels={"ray.io/accelerator-type": "in(A100,H100)"})
    other = Bundle(resources={"CPU": 1.0}, labels={"front": "!yes"})

    assert bundles_for(8, roles) == [other, other, cuda, cuda, cuda]  # six on GPUs, as there are
    assert bundles_for(9, roles) == [other, other, *[cuda] * 4]  # a worker has two
    assert bundles_for(1, roles) == [other, other]
    assert bundles_for(9, list(roles)[::-1]) == bundles_for(9, roles)


def test_devices_that_a_controller_has_are_no_workers(tmp_path: Path) -> None:
    roles = roles_of(deployment(tmp_path, SMALL), NODES)

    assert bundles_for(3, roles) == [Bundle(resources={"CPU": 1.0})] * 2
    assert bundles_for(3, roles[:1]) == []


def words(role: ClusterRole) -> list[str]:
    return command_of(role, "10.0.0.9", 7000, ["10.0.0.1:7000", "10.0.0.2:7000"], "/run/{}.pem".format)


def test_command_lines_hold_what_the_file_says_and_what_the_place_is(tmp_path: Path) -> None:
    found = large(tmp_path)

    controller = words(found["controller-0"])
    assert controller[:4] == [sys.executable, "-m", "clockwork_serve", "controller"]
    assert {"--store=s3://models/shop", "--lease=shop", "--listen-machines=10.0.0.9:7000", "--slo-ms=50"} <= {
        *controller
    }
    gateway = words(found["gateway-aaaaaaaa-0"])
    assert gateway[3:] == [
        "gateway", "--json", "--host=0.0.0.0", "--no-model-control", "--shared-memory=off",
        "--trusted-hosts=a.example", "--controller=10.0.0.1:7000,10.0.0.2:7000",
        "--machine-name=gateway-aaaaaaaa-0", "--cluster-certificate=/run/certificate.pem",
        "--cluster-key=/run/key.pem", "--cluster-ca=/run/certificate.pem",
    ]  # fmt: skip
    worker = words(found["worker-cuda-2"])
    assert worker[3:7] == ["worker", "--device=cuda", "--device=cuda", "--store=s3://models/shop"]
    assert "--machine-name=worker-cuda-2" in worker


def test_the_command_takes_every_command_line_that_is_built(tmp_path: Path) -> None:
    for role in large(tmp_path).values():
        name, *arguments = words(role)[3:]
        command = clockwork.get_command(click.Context(clockwork), name)
        assert command is not None
        command.make_context(name, arguments)


def test_an_address_of_version_6_stands_in_brackets(tmp_path: Path) -> None:
    role = large(tmp_path)["controller-0"]

    assert "--listen-machines=[fd00::9]:7000" in command_of(role, "fd00::9", 7000, [], str)


SMALL = 'name = "small"\nrepository = "models"\nstore = "store"\n[[workers]]\ndevice = "cpu"\n'
STORED = SMALL.replace('repository = "models"\n', "")


def test_a_small_file_is_one_of_everything(tmp_path: Path) -> None:
    found = roles_of(deployment(tmp_path, SMALL), [node("a" * 56, cpus=2)])

    assert [role.name for role in found] == ["controller-0", "gateway-0", "worker-cpu-0"]
    assert sum(role.cpus for role in found) == 2
    store = f"--store={Path.cwd()}/store"
    assert {"serve", f"{Path.cwd()}/models", store, "--device=cpu"} <= {*found[0].words}
    assert store in found[2].words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = ", "CONFIG (from FILE): expected valid TOML, found"),
        (SMALL.replace("small", "A b"), "name (from FILE): expected str matching regex"),
        (SMALL.replace("repository", "repositry"), "repositry (from FILE): expected a known field"),
        (SMALL.partition("\n")[2], "name (from FILE): expected a value, found 'none'; write name = ..."),
        ('name = "x"\nstore = "s"\n', "workers (from FILE): expected a value"),
        (SMALL.replace('store = "store"', ""), "store (from FILE): expected a value, found 'none'"),
        (SMALL + "cont = 2\n", "workers[0].cont (from FILE): expected a known field, found 'cont'; did"),
        (SMALL + 'count = "2"\n', "workers[0].count (from FILE): expected int | null, found '2'; correct it"),
        (SMALL + "count = 0\n", "workers[0].count (from FILE): expected int >= 1, found 0"),
        (SMALL + "count = 1\nper_node = 1\n", "workers[0].per_node (from FILE): expected no count beside it"),
        (SMALL + "[controllers]\ncount = 3\n", "controllers.count (from FILE): expected int <= 2, found 3"),
        (SMALL + "[controllers]\ncount = 2\n", "controllers.count (from FILE): expected 1 with a repository"),
        (SMALL + "[controllers]\nper_node = 1\n", "controllers.per_node (from FILE): expected no count"),
        (SMALL.replace('"cpu"', '"gpu"'), "workers[0].device (from FILE): expected cpu, torch-cpu, cuda"),
        (SMALL.replace('"cpu"', '"cpu:1"'), "workers[0].device (from FILE): expected a kind of device"),
        (SMALL + '[[workers]]\ndevice = "cpu"\n', "workers.name (from FILE): expected another name for each"),
        (SMALL + "settings = {slo_ms = 1}\n", "workers[0].settings.slo_ms (from FILE): expected a setting"),
        (SMALL + "settings = {thread = 1}\n", "did you mean threads?"),
        (SMALL + "settings = {pin = true}\n", "set isolate: cores"),
        (SMALL + "settings = {threads = 0}\n", "workers[0].settings.threads (from FILE): expected a whole"),
        (SMALL + "[gateways.settings]\ncontroller = 'x:1'\n", "gateways.settings.controller (from FILE)"),
        (SMALL + "settings = {cluster_name = 'x.y'}\n", "workers[0].settings.cluster_name (from FILE)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_was_expected(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        deployment(tmp_path, text)

    assert said in str(error.value).replace(str(tmp_path / "shop.toml"), "FILE")


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"CONFIG \(from gone.toml\): expected a readable file, found"):
        read_deployment("gone.toml")


@pytest.mark.parametrize(
    ("text", "nodes", "said"),
    [
        (SMALL, [], "controllers.count: expected 1 nodes for controllers; found 0 in the Ray cluster"),
        (STORED + "[controllers]\ncount = 2\n", NODES[:1], "controllers.count: expected 2 nodes"),
        (SMALL + 'labels = {x = "y"}\n', NODES, "workers.labels: expected a node with {'x': 'y'}"),
        (SMALL.replace("cpu", "cuda"), NODES[:1], "workers.labels: expected a node with 1 GPUs"),
        (SMALL.replace("cpu", "cuda") + "count = 9\n", NODES, "gpus: expected 9 GPUs for all roles; found 8"),
        (SMALL + "count = 50\n", NODES, "cpus: expected 51 CPUs for all roles; found 24 in the Ray cluster;"),
    ],
)
def test_nodes_that_are_too_few_are_counted(tmp_path: Path, text: str, nodes: list[Node], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        roles_of(deployment(tmp_path, text), nodes)

    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("wanted", "is_selected"),
    [("x", True), ("!x", False), ("in(w, x)", True), ("!in(w, x)", False), ("in(w)", False), ("!w", True)],
)
def test_selectors_are_those_of_ray(wanted: str, is_selected: bool) -> None:
    selector = Section(labels={"key": wanted}).labels

    assert selects(selector, {"key": "x", "other": "w"}) is is_selected
    assert selects(selector, {}) is wanted.startswith("!")


@pytest.mark.parametrize("table", ["controllers", "gateways", "[workers]"])
@pytest.mark.parametrize("wanted", ["in(a,b)", "in(a, b)", "!in( c ,d )"])
def test_ray_gets_no_blank_in_a_selector_for_it_takes_one_for_a_part_of_the_value(
    tmp_path: Path, table: str, wanted: str
) -> None:
    head, _, workers = SMALL.partition("[[workers]]")
    part = f'[{table}]\nlabels = {{zone = "{wanted}"}}\n'
    text = f"{head}{part}{workers}" if table == "[workers]" else f"{SMALL}{part}"

    found = roles_of(deployment(tmp_path, text), [node("a" * 56, zone="a")])

    assert [role.labels["zone"] for role in found if role.labels] == [wanted.replace(" ", "")]
