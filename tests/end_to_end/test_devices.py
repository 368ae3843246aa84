"""Two devices, a process each: a hot model is on both, and one of them suffices while the other is away."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.server import ServerConfig, running_server
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness import repositories
from harness.http_load import Report, closed_loop, infer_message, run
from harness.serving import Serving, total, until
from tests.end_to_end.conftest import PATIENT_SLO_MS

WORKERS = ("worker-cpu:0", "worker-cpu:1")
SLEEP_S = 0.1
SLO_MS = 1000
CLIENTS = 16
"""More than one device can do within that time: the model is copied to the second."""
LONG_SLO_MS = 20_000
"""One device can do it within that time: what is refused says nothing about the device that is away."""
PAUSE_S = 0.5
"""After a refusal: clients that ask again at once are all refused while two answers are computed."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Iterator[Serving]:
    """One model that takes a while without using a core, on two devices."""
    root = tmp_path_factory.mktemp("pair") / "models"
    repositories.sleeper(root, "hot", SLEEP_S)
    config = ServerConfig(
        settings=Settings(
            repository=str(root), http_port=0, grpc_port=0, metrics_port=0, slo_ms=PATIENT_SLO_MS
        ),
        store=StoreConfig(cache_dir=str(cache)),
        devices=tuple(DeviceConfig(device=f"cpu:{n}", memory_bytes=8 * MIB) for n in range(2)),
    )
    with running_server(config) as server:
        assert set(WORKERS) <= set(server.names)
        yield Serving(server, WORKERS[0])


def load(serving: Serving, requests: int, *, slo_ms: int = SLO_MS, kill: int | None = None) -> Report:
    width = 4
    message = infer_message(
        serving.http_url, "hot", [("x", "FP32", (1, width), bytes(4 * width))], slo_ms=slo_ms
    )

    def messages(index: int) -> bytes:
        if kill is not None and index == requests // 3:
            os.kill(kill, signal.SIGKILL)
        return message

    return run(
        closed_loop(serving.http_url, messages, requests=requests, connections=CLIENTS, pause_s=PAUSE_S)
    )


def infers(serving: Serving, device: str) -> float:
    return total(serving.metrics(), "clockwork_actions_total", device=device, action="infer", status="ok")


def test_a_hot_model_runs_on_both_devices(pair: Serving) -> None:
    before = [infers(pair, f"cpu:{n}") for n in range(2)]
    report = load(pair, 120)
    assert report.ends()["200"] >= 60
    assert all(infers(pair, f"cpu:{n}") >= before[n] + 10 for n in range(2))


def test_one_device_suffices_while_the_other_is_away(pair: Serving) -> None:
    load(pair, 40)
    before = infers(pair, "cpu:1")
    victim = pair.server.pid("worker-cpu:1")
    assert victim is not None
    report = load(pair, 90, slo_ms=LONG_SLO_MS, kill=victim)
    assert infers(pair, "cpu:1") > before
    assert len(report.samples) == 90
    assert report.unanswered == 0
    assert not report.ends().keys() - {"200", "500 worker_lost"}
    assert report.ends()["200"] >= 84
    until("the other device is back", lambda: pair.server.pid("worker-cpu:1") not in {None, victim})
