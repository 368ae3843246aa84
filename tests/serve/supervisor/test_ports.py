"""Ports are held for our own processes, and ports in use are named with a remedy."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.supervisor.run_dir import Ports


@contextmanager
def listener(port: int = 0, *, shared: bool = False) -> Iterator[int]:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen()
        yield listening.getsockname()[1]


def test_chosen_ports_can_be_bound_by_our_processes_and_reached() -> None:
    ports = Ports("127.0.0.1", {"http_port": 0, "grpc_port": 0, "metrics_port": None})
    assert set(ports.number_by_name) == {"http_port", "grpc_port"}
    http = ports.number_by_name["http_port"]
    assert http != ports.number_by_name["grpc_port"]
    with (
        listener(http, shared=True),
        listener(http, shared=True),
        socket.create_connection(("127.0.0.1", http), 10),
    ):
        pass
    ports.close()


@pytest.mark.parametrize("shared", [False, True])
def test_a_taken_port_is_named_with_the_setting_and_a_remedy(*, shared: bool) -> None:
    with (
        listener(shared=shared) as taken,
        pytest.raises(
            ConfigError, match=rf"grpc_port: expected a free port; found {taken} .*--grpc-port \(0 lets"
        ),
    ):
        Ports("127.0.0.1", {"http_port": 0, "grpc_port": taken})


def test_ports_are_free_again_after_close() -> None:
    ports = Ports("127.0.0.1", {"http_port": 0})
    number = ports.number_by_name["http_port"]
    ports.close()
    Ports("127.0.0.1", {"http_port": number}).close()


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(ConfigError, match=r"http_port: cannot listen on 192\.0\.2\.1"):
        Ports("192.0.2.1", {"http_port": 0})
