"""Gateways for a server on another machine: their settings, their names, and their ports."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clockwork_serve import __version__
from clockwork_serve.config import Settings, read_settings
from clockwork_serve.errors import ConfigError, TransportError
from clockwork_serve.messages import Frame
from clockwork_serve.serve import transport
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.remote.config import FAR_GATEWAY, FAR_NAME
from clockwork_serve.serve.remote.finding import FarConnector
from clockwork_serve.serve.supervisor import children as far_children
from clockwork_serve.serve.supervisor import children as far_gateways
from clockwork_serve.serve.supervisor.processes import Launch
from clockwork_serve.serve.transport import PROTOCOL
from tests.serve.certificates import certificates
from tests.serve.links import until
from tests.serve.remote.bridges import GATEWAY, READY, middle
from tests.serve.remote.machine_links import theirs


def config(**fields: Any) -> Settings:
    plain: dict[str, Any] = {
        "http_port": 0, "grpc_port": 0, "metrics_port": 0, "machine_name": "alpha",
        "controller": "10.0.0.1:7000", "silence_s": 3.0,
    }  # fmt: skip
    return Settings(**(plain | fields))


class Children:
    """Stands for the processes: keeps their launches, and whether their ports were held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches: list[Launch] = []
        self.taken: list[bool] = []
        self.at: dict[str, str] = {}
        monkeypatch.setattr(far_children, "run_until_stopped", self._run)
        monkeypatch.setattr(far_children, "check_joining", lambda settings, joining: None)

    def run(self, settings: Settings) -> int:
        return far_gateways.run_gateways(settings, self.at.update)

    @property
    def configs(self) -> list[GatewayConfig]:
        return [msgspec.json.decode(launch.config, type=GatewayConfig) for launch in self.launches]

    def _run(self, launches: Callable[[Path], Sequence[Launch]], drain_s: float) -> int:
        assert drain_s == 10.0 + far_gateways.ENDING_S
        assert self.at, "it says where, once the ports are held"
        self.launches += launches(Path("/run"))
        self.taken += [taken(port) for port in self.ports]
        return 7

    @property
    def ports(self) -> list[int]:
        return [port for port in self.configs[0].settings.ports.values() if port is not None]


def taken(port: int) -> bool:
    """Whether a port is held by a socket, listening or not."""
    with socket.socket() as other:
        try:
            other.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    return Children(monkeypatch)


def test_ports_are_held_for_gateways_for_as_long_as_they_run(children: Children) -> None:
    assert children.run(config()) == 7, "the status of the processes"
    http, grpc, metrics = children.ports
    assert children.taken == [True] * 3
    assert [taken(port) for port in (http, grpc, metrics)] == [False] * 3
    assert children.at == {
        "http": f"http://127.0.0.1:{http}", "grpc": f"127.0.0.1:{grpc}",
        "metrics": f"http://127.0.0.1:{metrics}/metrics",
    }  # fmt: skip


def test_ports_that_are_off_are_not_held(children: Children) -> None:
    children.run(config(grpc_port=None, metrics_port=None))
    (found,) = children.configs
    assert (found.settings.grpc_port, found.settings.metrics_port) == (None, None)
    assert (children.at["grpc"], children.at["metrics"]) == ("", "")


def test_each_is_named_after_its_machine_and_knows_the_server(children: Children) -> None:
    given = config(gateways=12, model_control=False, slo_ms=5.0)
    children.run(given)
    found = children.configs
    names = [f"alpha.gateway-{number}" for number in range(12)]
    assert [launch.name for launch in children.launches] == [each.name for each in found] == names
    assert {launch.stuck_s for launch in children.launches} == {3.0}
    assert all(FAR_GATEWAY.fullmatch(name) and not FAR_NAME.fullmatch(name) for name in names)
    assert {launch.module for launch in children.launches} == {"clockwork_serve.serve.processes.gateway"}
    assert all(each.elsewhere for each in found)
    assert [each.number for each in found] == list(range(12))
    assert [each.settings.metrics_port is None for each in found] == [False] + [True] * 11
    assert len({each.settings.http_port for each in found}) == 1
    all_but_ports = [name for name in Settings.__struct_fields__ if not name.endswith("_port")]
    for each in found:
        for name in all_but_ports:
            assert getattr(each.settings, name) == getattr(given, name), name


def test_every_setting_that_a_process_is_given_it_knows(children: Children) -> None:
    children.run(config())
    assert set(msgspec.json.decode(children.launches[0].config)) <= set(GatewayConfig.__struct_fields__)


def test_a_server_s_own_gateway_has_no_name_that_a_far_one_may_have() -> None:
    for name in ("gateway-0", "bridge", ".gateway-0", "../x.gateway-0", "a b.gateway-0", "a.gateway-100"):
        assert FAR_GATEWAY.fullmatch(name) is None
    assert FAR_GATEWAY.fullmatch("a.b-c_d.gateway-63")


@pytest.mark.parametrize("machine", ["a b", ".a", "-a", "a/b", "x" * 65, "a\n"])
def test_a_machine_name_that_is_invalid_for_gateways_is_named(children: Children, machine: str) -> None:
    with pytest.raises(ConfigError, match=r"machine_name: expected a name such that .*; give --machine-name"):
        children.run(config(machine_name=machine))


def test_settings_that_a_server_refuses_are_refused_here_too(children: Children) -> None:
    with pytest.raises(ConfigError, match="gateways: expected 1 to 64; found 65"):
        children.run(config(gateways=65))


def test_a_port_that_is_taken_is_named_before_anything_runs(children: Children) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as held,
        pytest.raises(ConfigError, match="metrics_port: expected a free port"),
    ):
        children.run(config(metrics_port=held.getsockname()[1]))
    assert (children.at, children.launches) == ({}, [])


def test_files_for_access_are_checked_before_anything_runs(children: Children, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tls_certificate"):
        children.run(config(tls_certificate=str(tmp_path / "none"), tls_key=str(tmp_path / "none")))
    assert (children.at, children.launches) == ({}, [])


# From settings


def flags(folder: Path, **more: object) -> dict[str, object]:
    made = certificates(folder)
    return {
        "controller": "10.0.0.1:7000", "cluster_certificate": made.client_certificate,
        "cluster_key": made.client_key, "cluster_ca": made.ca, **more,
    }  # fmt: skip


def test_a_machine_without_a_name_has_that_of_its_host(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "box.example.org")
    children.run(config(machine_name=""))
    assert [each.name for each in children.configs] == ["box.gateway-0"]


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"controller: expected HOST:PORT .* give it with --controller"):
        far_gateways.run_gateways(read_settings({}, {}, None))
    with pytest.raises(ConfigError, match="cluster_ca: expected a PEM file, as a gateway on another machine"):
        far_gateways.run_gateways(read_settings(flags(tmp_path, cluster_ca=None), {}, None))


# With a bridge


@pytest.mark.parametrize("protocol", [PROTOCOL, PROTOCOL + 1, PROTOCOL + 2])
async def test_a_gateway_reaches_the_controller_from_there_if_their_protocols_are_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, protocol: int
) -> None:
    async with middle(tmp_path) as at:
        files = theirs(certificates(tmp_path))
        settings = Settings(controller=f"127.0.0.1:{at.port}", **files.named())
        told: list[Frame] = []
        with monkeypatch.context() as later:
            later.setattr(transport, "PROTOCOL", protocol)
            later.setattr(transport, "__version__", "9.9")
            connector = FarConnector(GATEWAY, settings)
        reaching = asyncio.ensure_future(connector(told.extend, lambda why: None))
        if protocol <= PROTOCOL + 1:
            await at.controller.linked()
            at.controller.send(READY)
            found = await reaching
            assert (found.is_open, told, connector.refused.done()) == (True, [READY], False)
            found.close()
            await until(at.controller.lost.is_set)
            return
        with pytest.raises(TransportError):
            await reaching
        assert not connector.refused.done(), "it comes again: others may lead, or be upgraded"
        for own, other in (("9.9", __version__), (__version__, "9.9")):  # each side says so
            said = [each.getMessage() for each in caplog.records]
            told_by = [each for each in said if f"as '{own}' here" in each]
            assert told_by
            assert f"clockwork-serve '{other}' and speaks protocol" in told_by[0]
