"""A gateway with its servers and a fake controller, on a loop in its own thread, for blocking clients."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import uvloop

from clockwork_serve.config import Settings
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.processes.gateway import GatewayServers
from clockwork_serve.units import MIB
from tests.serve.gateway.fake_controller import FakeController, served, spec

T = TypeVar("T")

CATALOGUE = (
    served("ident", (spec("X", "FP32", 2),), (spec("Y", "FP32", 2),)),
    served("any", (spec("X", "FP32", -1),), (spec("Y", "FP32", -1),), batched=False, output_bytes=4 * MIB),
    served("text", (spec("X", "BYTES", 2),), (spec("Y", "BYTES", 2),)),
    served("half", (spec("X", "FP16", 2),), (spec("Y", "FP16", 2),)),
    served(
        "pair",
        (spec("A", "INT32", 16), spec("B", "INT32", 16)),
        (spec("C", "INT32", 16), spec("D", "INT32", 16)),
    ),
)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


class RunningGateway:
    def __init__(self, run_dir: Path) -> None:
        self.controller = FakeController(run_dir / "controller.sock", *CATALOGUE)
        self.servers: GatewayServers
        self.loop: asyncio.AbstractEventLoop

    @property
    def http_port(self) -> int:
        return self.servers.port_by_name["http_port"]

    @property
    def http_url(self) -> str:
        return f"127.0.0.1:{self.http_port}"

    @property
    def grpc_url(self) -> str:
        return f"127.0.0.1:{self.servers.port_by_name['grpc_port']}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(90)

    def do(self, function: Callable[[], T]) -> T:
        async def body() -> T:
            return function()

        return self.run(body())

    def until(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        until(lambda: self.do(condition), seconds)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.http_port), timeout=60)

    def exchange(self, sent: bytes) -> bytes:
        """All bytes received until the server closes."""
        with self.connect() as client:
            client.sendall(sent)
            found = b""
            while part := client.recv(65536):
                found += part
            return found


def gateway_config(**fields: Any) -> GatewayConfig:
    """A gateway's configuration, from settings and other fields."""
    given = {name: fields.pop(name) for name in list(fields) if name in Settings.__struct_fields__}
    return GatewayConfig(settings=Settings(**given), **fields)


@contextmanager
def running_gateway(run_dir: Path, **fields: Any) -> Iterator[RunningGateway]:
    found = RunningGateway(run_dir)
    plain: dict[str, Any] = {
        "run_dir": str(run_dir), "name": "g0", "http_port": 0, "grpc_port": None, "metrics_port": None,
        "gateway_memory": 32 * MIB, "max_body": 8 * MIB,
        "slo_ms": 60_000.0,  # what is not about time must not fail where that is short
    }  # fmt: skip
    config = gateway_config(**plain | fields)
    started = threading.Event()
    stop: list[Callable[[], None]] = []

    async def main() -> None:
        end = asyncio.Event()
        found.loop = asyncio.get_running_loop()
        stop.append(end.set)
        await found.controller.start()
        found.servers = GatewayServers(config)
        await found.servers.start()
        while not found.servers.gateway.link.is_open:
            await asyncio.sleep(0.002)
        started.set()
        await end.wait()
        await found.servers.close(0.2)
        found.controller.stop()

    thread = threading.Thread(target=lambda: uvloop.run(main()), daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield found
    finally:
        found.loop.call_soon_threadsafe(stop[0])
        thread.join(60)
        assert not thread.is_alive()
