"""A server with two workers, and which of them has the load."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clockwork_serve.config import Settings
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.server import ServerConfig, running_server
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB, ms
from harness.serving import Serving, total
from tests.end_to_end.conftest import PATIENT_SLO_MS

SOON = ControllerConfig(hang_ns=ms(300), hang_grace_ns=ms(500))
"""Such patience that a test is short; the usual one is ten times that."""


@contextmanager
def two_workers(root: Path, cache: Path, lines: list[str], **settings: Any) -> Iterator[Serving]:
    """A server with two CPU devices, each a process; ``Serving.worker`` is the first."""
    given: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, "log_level": "warning"}
    given |= {"slo_ms": PATIENT_SLO_MS} | settings
    config = ServerConfig(
        settings=Settings(repository=str(root), **given), store=StoreConfig(cache_dir=str(cache)),
        devices=tuple(
            DeviceConfig(device=f"cpu:{number}", kind="cpu", memory_bytes=16 * MIB) for number in (0, 1)
        ),
        controller=SOON,
    )  # fmt: skip
    with running_server(config, on_line=lines.append) as server:
        yield Serving(server, next(name for name in server.names if name.startswith("worker")))


def busiest(serving: Serving) -> str:
    """The worker that did most: the small models of these tests may all be on one."""
    metrics = serving.metrics()

    def busy_s(name: str) -> float:
        device = name.removeprefix("worker-")
        return total(metrics, "clockwork_lane_busy_seconds_total", device=device, lane="exec")

    return max((name for name in serving.server.names if name.startswith("worker")), key=busy_s)
