"""The processes of a server; each one's configuration is what its module reads."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clockwork_serve.config import Settings
from clockwork_serve.config.values import read_devices
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.child import ObserverConfig
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.processes.controller import ControllerProcessConfig
from clockwork_serve.serve.remote.config import BridgeConfig
from clockwork_serve.serve.supervisor.children import worker_launches
from clockwork_serve.serve.supervisor.config import ServerConfig, controller_alone
from clockwork_serve.serve.supervisor.processes import launches, pinned_cores, workers_of
from clockwork_serve.serve.worker.host import WorkerConfig
from clockwork_serve.store import StoreConfig

DEVICES = (
    DeviceConfig(device="cpu:0"),
    DeviceConfig(device="emulated:0", kind="emulated", profile="v100"),
    DeviceConfig(device="cpu:1"),
    DeviceConfig(device="emulated:1", kind="emulated", profile="v100"),
)
MACHINES = {"listen_machines": "[::1]:7", "cluster_certificate": "/c"}


def config(**fields: Any) -> ServerConfig:
    devices = {"devices": fields.pop("devices")} if "devices" in fields else {}
    settings = Settings(repository="/r", **fields)
    return ServerConfig(settings=settings, store=StoreConfig(cache_dir="/c"), **devices)


def test_each_real_device_has_a_process_and_emulated_ones_share_one() -> None:
    made = launches(config(devices=DEVICES, gateways=2), Path("/run"), {"http_port": 1, "metrics_port": 3})
    assert [launch.name for launch in made] == [
        "controller", "worker-cpu:0", "worker-cpu:1", "worker-emulated", "gateway-0", "gateway-1",
        "observer",
    ]  # fmt: skip
    assert workers_of(DEVICES)[2][1] == (DEVICES[1], DEVICES[3])
    controller = msgspec.json.decode(made[0].config, type=ControllerProcessConfig)
    assert (controller.run_dir, controller.controller.expected_devices) == ("/run", 4)
    worker = msgspec.json.decode(made[1].config, type=WorkerConfig)
    assert (worker.name, worker.devices) == ("worker-cpu:0", DEVICES[:1])
    assert not any(launch.cpus for launch in made)


def test_a_second_controller_has_a_name_of_its_own_and_else_the_same_configuration() -> None:
    made = launches(config(controllers=2), Path("/run"), {"http_port": 1})
    first, second = (msgspec.json.decode(one.config, type=ControllerProcessConfig) for one in made[:2])
    assert [one.name for one in made[:3]] == ["controller", "controller-1", "worker-cpu:0"]
    assert (first.name, second.name) == ("controller", "controller-1")
    assert msgspec.structs.replace(second, name=first.name) == first
    assert made[0].stuck_s == made[1].stuck_s > 0


def test_all_but_workers_are_watched_unless_that_is_off() -> None:
    for stuck_s in (3.0, 7.0, 0.0):
        made = launches(config(**MACHINES, stuck_s=stuck_s), Path("/run"), {"http_port": 1})
        assert {launch.name: launch.stuck_s for launch in made} == {
            "controller": stuck_s, "worker-cpu:0": 0.0, "gateway-0": stuck_s, "bridge": stuck_s,
            "observer": stuck_s,
        }  # fmt: skip


def test_an_observer_is_there_where_there_is_a_journal_and_nobody_waits_for_it() -> None:
    for journal in ("memory", "/j"):
        (made,) = (
            one for one in launches(config(journal=journal), Path("/run"), {}) if one.name == "observer"
        )
        assert made.optional
    assert "observer" not in {one.name for one in launches(config(journal=None), Path("/run"), {})}


def test_emulated_devices_that_are_set_apart_have_a_process_each() -> None:
    apart = [DeviceConfig(device=f"emulated:{number}", kind="emulated", apart=True) for number in (2, 3)]
    assert [(name, len(devices)) for name, devices in workers_of((*DEVICES, *apart))] == [
        ("worker-cpu:0", 1), ("worker-cpu:1", 1), ("worker-emulated:2", 1), ("worker-emulated:3", 1),
        ("worker-emulated", 2),
    ]  # fmt: skip


def test_gateways_share_ports_but_not_metrics() -> None:
    ports = {"http_port": 1, "metrics_port": 3}
    made = [
        msgspec.json.decode(launch.config, type=GatewayConfig)
        for launch in launches(config(gateways=2), Path("/run"), ports)
        if launch.name.startswith("gateway")
    ]
    assert [each.settings.http_port for each in made] == [1, 1]
    assert [each.settings.grpc_port for each in made] == [None, None]
    assert [each.settings.metrics_port for each in made] == [3, None]
    assert all(each.reuse_port for each in made)
    assert not any(each.elsewhere for each in made), "their server is here"


def test_other_machines_may_join_only_where_it_is_configured() -> None:
    ports = {"http_port": 1}
    assert "bridge" not in {launch.name for launch in launches(config(), Path("/run"), ports)}
    (made,) = (
        launch for launch in launches(config(**MACHINES), Path("/run"), ports) if launch.name == "bridge"
    )
    found = msgspec.json.decode(made.config, type=BridgeConfig)
    assert (found.run_dir, found.settings.listen_machines, found.kinds) == ("/run", "[::1]:7", ("cpu",))


def test_a_controller_by_itself_has_a_lease_that_hosts_share_and_no_port_for_clients() -> None:
    settings = Settings(store="/s", listen_machines="[::1]:7", gateways=3, host="10.0.0.1", repository="/r")
    alone = controller_alone(settings)
    assert (alone.devices, alone.settings.silence_s, alone.settings.repository) == ((), 0.75, "")
    made = {one.name: one.config for one in launches(alone, Path("/run"), {"metrics_port": 3})}
    assert list(made) == ["controller", "gateway-0", "bridge", "observer"]
    controller = msgspec.json.decode(made["controller"], type=ControllerProcessConfig)
    assert (controller.shared, controller.controller.expected_devices) == (True, 1)
    gateway = msgspec.json.decode(made["gateway-0"], type=GatewayConfig)
    assert (gateway.metrics_only, gateway.settings.metrics_port, gateway.settings.grpc_port) == (
        True,
        3,
        None,
    )
    bridge = msgspec.json.decode(made["bridge"], type=BridgeConfig)
    assert (bridge.shared, bridge.kinds) == (True, ())
    assert "gateway-0" not in {one.name for one in launches(alone, Path("/run"), {})}, "metrics are off"
    (usual, *_) = launches(config(), Path("/run"), {"http_port": 1})
    assert not msgspec.json.decode(usual.config, type=ControllerProcessConfig).shared


@pytest.mark.parametrize("lacking", ["store", "listen_machines"])
def test_a_controller_by_itself_needs_a_store_and_a_port_for_others(lacking: str) -> None:
    given = {"store": "/s", "listen_machines": "[::1]:7"}
    del given[lacking]
    flag = lacking.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{lacking}: expected .*; found none; .*--{flag}"):
        controller_alone(Settings(**given))


def test_every_module_reads_exactly_the_configuration_that_it_is_given() -> None:
    ports = {"http_port": 1, "grpc_port": 2, "metrics_port": 3}
    records = {
        "gateway": GatewayConfig, "controller": ControllerProcessConfig, "worker": WorkerConfig,
        "bridge": BridgeConfig, "observer": ObserverConfig,
    }  # fmt: skip
    for launch in launches(config(**MACHINES), Path("/run"), ports):
        record = records[launch.module.rpartition(".")[2]]
        assert f"type={record.__name__})" in inspect.getsource(importlib.import_module(launch.module))
        given = msgspec.json.decode(launch.config)
        assert set(given) <= set(record.__struct_fields__), launch.module
        msgspec.json.decode(launch.config, type=record)


@pytest.mark.parametrize(
    ("cpus", "workers", "rest"),
    [({0, 1, 2, 3, 4, 5, 6}, [(5, 6), (3, 4), (1, 2)], (0,)), ({2, 7, 8, 9}, [(9,), (8,), (7,)], (2,))],
)
def test_workers_are_pinned_to_cores_of_their_own_and_all_else_to_the_others(
    cpus: set[int], workers: list[tuple[int, ...]], rest: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: cpus)
    made = launches(config(devices=DEVICES, isolate="cores", **MACHINES), Path("/run"), {"http_port": 1})
    assert [one.cpus for one in made if one.name.startswith("worker")] == workers
    assert {one.cpus for one in made if not one.name.startswith("worker")} == {rest}


def test_workers_of_another_machine_are_pinned_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    settings = Settings(device=read_devices("cpu:0,cpu:1"), isolate="cores", machine_name="m")
    made = worker_launches(settings, Path("/run"))
    assert [(one.name, one.cpus) for one in made] == [("worker-m.cpu:0", (2,)), ("worker-m.cpu:1", (1,))]


def test_too_few_cores_to_pin_workers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    with pytest.raises(ConfigError, match="isolate: expected more than 2 cores for 2 workers; found 2"):
        pinned_cores(Settings(repository="/r", isolate="cores"), 2)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"devices": ()}, "devices"),
        ({"devices": (DEVICES[0], DEVICES[0])}, "devices"),
        ({"gateways": 0}, "gateways"),
        ({"drain_s": -1.0}, "drain_s"),
        ({"gateway_memory": 100, "max_body": 51}, "gateway_memory"),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named}: expected .*; found"):
        config(**fields)
