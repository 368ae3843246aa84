"""A gateway as a process of its own: it starts, stops on SIGTERM, and logs why it cannot start."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clockwork_serve.config import Settings
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.child import EXIT_CONFIG
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.processes.gateway import GatewayServers
from tests.serve.gateway.running import gateway_config, running_gateway


def launch(**fields: Any) -> subprocess.Popen[bytes]:
    plain: dict[str, Any] = {
        "name": "g0",
        "http_port": 0,
        "grpc_port": 0,
        "metrics_port": None,
        "log_format": "json",
    }
    config = msgspec.json.encode(gateway_config(**plain | fields)).decode()
    return subprocess.Popen(
        [sys.executable, "-m", "clockwork_serve.serve.processes.gateway", config],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
    )  # fmt: skip


@contextmanager
def running(**fields: Any) -> Iterator[tuple[subprocess.Popen[bytes], dict[str, Any]]]:
    process = launch(**fields)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            found = json.loads(line)
            if found["message"] == "listening":
                break
        else:
            raise AssertionError("it ended")
        yield process, found
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def status(port: int, path: str) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n".encode())
        return int(client.makefile("rb").read().split()[1])


def test_it_listens_waits_for_its_controller_and_ends_on_sigterm(tmp_path: Path) -> None:
    with running(run_dir=str(tmp_path)) as (process, listening):
        assert listening["grpc_port"] > 0
        assert status(listening["http_port"], "/v2/health/live") == 200
        assert status(listening["http_port"], "/v2/health/ready") == 503
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
        assert status(listening["http_port"], "/v2/health/live") == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


@pytest.mark.parametrize("name", ["http_port", "metrics_port", "grpc_port"])
def test_a_port_that_is_taken_is_named(tmp_path: Path, name: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        process = launch(run_dir=str(tmp_path), **{name: port})
        _, errors = process.communicate(timeout=60)
    assert process.returncode == EXIT_CONFIG
    last = json.loads(errors.splitlines()[-1])
    assert f"{name}: expected a free port; found {port} on 127.0.0.1" in last["message"]
    assert "traceback" not in last


def test_two_gateways_may_share_ports(tmp_path: Path) -> None:
    with (
        running(run_dir=str(tmp_path), reuse_port=True) as (_, first),
        running(
            run_dir=str(tmp_path), name="g1", reuse_port=True, http_port=first["http_port"],
            grpc_port=first["grpc_port"],
        ) as (_, second),
    ):  # fmt: skip
        assert (second["http_port"], second["grpc_port"]) == (first["http_port"], first["grpc_port"])


async def test_http_is_listened_on_last(tmp_path: Path) -> None:
    """A request that arrived before would wait unread, and be answered late as if it were in time."""
    config = GatewayConfig(
        settings=Settings(http_port=0, grpc_port=0, metrics_port=0), run_dir=str(tmp_path), name="g"
    )
    servers = GatewayServers(config)
    listening: list[list[str]] = []
    try:
        await servers.start(lambda: listening.append(list(servers.port_by_name)))
    finally:
        await servers.close()
    assert listening == [[]]
    assert list(servers.port_by_name)[-1] == "http_port"


def test_a_region_must_hold_two_bodies(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gateway_memory: expected at least twice max_body"):
        GatewayConfig(settings=Settings(gateway_memory=100, max_body=51), run_dir=str(tmp_path), name="g")


def test_grpc_may_be_off(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as found:
        assert "grpc_port" not in found.servers.port_by_name


async def test_a_start_that_failed_can_be_closed(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        config = GatewayConfig(
            settings=Settings(http_port=0, grpc_port=other.getsockname()[1], metrics_port=None),
            run_dir=str(tmp_path),
            name="g",
        )
        servers = GatewayServers(config)
        with pytest.raises(ConfigError, match="grpc_port"):
            await servers.start()
    await servers.close()
    assert len(asyncio.all_tasks()) <= 2
