"""The journal of a real server, with all that went wrong on it, is decided again as it was."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from clockwork_serve.cli.entry import run as clockwork
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import (
    GatewayLost,
    ModelRemoved,
    Outcome,
    Quarantined,
    QuotasSet,
    Reason,
    Request,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.sim.replay import replay
from clockwork_serve.telemetry import read_journal
from harness import repositories
from harness.http_load import closed_loop, infer_message, run
from harness.serving import Serving, until
from tests.end_to_end.conftest import call, x_json
from tests.end_to_end.killers import KILLER

Start = Callable[..., AbstractContextManager[Serving]]

WIDE, LONG = 64, 16
MODELS = 6
RECOVERY_S = 30.0
KEYS = "\n".join(
    [
        '[[tenants]]\nname = "small"\ndevice_ms_per_s = 1\nburst_s = 0.01\n',
        *(
            f'[[keys]]\nname = "{name}"\nsha256 = "{hashlib.sha256(name.encode()).hexdigest()}"\n'
            f"may = {may}\n{tenant}"
            for name, may, tenant in (
                ("all", '["infer", "metrics", "admin"]', ""), ("poor", '["infer"]', 'tenant = "small"\n'),
            )
        ),
    ]
)  # fmt: skip
SLO = {"parameters": {"slo_ms": 20_000}}


@contextmanager
def served(tmp_path: Path, start: Start, policy: str) -> Iterator[Serving]:
    """Two gateways, a tenant with a quota, matrices, and a model that kills on some inputs."""
    root, keys = tmp_path / "models", tmp_path / "keys.toml"
    repositories.python_model(root, "killer", KILLER)
    for index in range(MODELS):
        repositories.one_matrix(root, f"m{index}", repositories.matrix_of(index, WIDE, LONG))
    keys.touch(0o600)
    keys.write_text(KEYS)
    settings = {
        "gateways": 2, "api_keys": str(keys), "journal": tmp_path / "journal",
        "controller": ControllerConfig(policy=policy),
        "memory_bytes": 256 << 10,
    }  # fmt: skip
    with start(root, **settings) as serving:
        yield serving


def ask(serving: Serving, path: str, body: bytes = b"{}", key: str = "all") -> int:
    return call(serving.http_url, path, body, {"x-api-key": key}).status


def over_grpc(serving: Serving, stop: threading.Event) -> None:
    """A client over gRPC, until ``stop``."""
    x = tritonclient.grpc.InferInput("x", [1, WIDE], "FP32")
    x.set_data_from_numpy(np.zeros((1, WIDE), np.float32))
    with tritonclient.grpc.InferenceServerClient(serving.grpc_url) as client:
        while not stop.is_set():
            try:
                client.infer("m5", [x], headers={"x-api-key": "all"}, client_timeout=1)
            except InferenceServerException:
                time.sleep(0.01)


def trouble(serving: Serving) -> None:
    """All that may happen to a server, while it is under load."""
    ready = "/v2/models/m0/infer"
    body = x_json([0.0] * WIDE, **SLO)

    def works() -> bool:
        return ask(serving, ready, body) == 200

    for _ in range(40):  # more than the quota of a tenant allows
        ask(serving, "/v2/models/m1/infer", body, "poor")
    os.kill(serving.worker_pid(), signal.SIGKILL)
    until("the worker is back", works, RECOVERY_S)
    for _ in range(3):
        ask(serving, "/v2/repository/models/m2/unload")
        ask(serving, "/v2/repository/models/m2/load")
    for _ in range(3):
        until("the worker is back", works, RECOVERY_S)
        ask(serving, "/v2/models/killer/infer", x_json([666.0, 0, 0, 0], **SLO))
    until("the worker is back", works, RECOVERY_S)
    assert ask(serving, "/v2/repository/models/killer/load") == 200
    gateway = serving.server.pid("gateway-1")
    assert gateway is not None
    os.kill(gateway, signal.SIGKILL)
    until("the gateway is back", lambda: serving.server.pid("gateway-1") not in {None, gateway}, RECOVERY_S)
    until("it answers", works, RECOVERY_S)


def under_load(serving: Serving) -> None:
    """HTTP and gRPC clients while everything goes wrong."""
    stop = threading.Event()
    threads = [threading.Thread(target=over_grpc, args=(serving, stop)) for _ in range(2)]

    def http() -> None:
        x = [("x", "FP32", (1, WIDE), bytes(4 * WIDE))]
        messages = [
            infer_message(serving.http_url, f"m{index}", x, slo_ms=50).replace(
                b"\r\n", b"\r\nx-api-key: all\r\n", 1
            )
            for index in range(MODELS)
        ]
        while not stop.is_set():
            load = closed_loop(
                serving.http_url,
                lambda index: messages[index % MODELS],
                requests=500,
                connections=8,
                pause_s=0.02,
            )
            run(load)

    threads.append(threading.Thread(target=http))
    for thread in threads:
        thread.start()
    try:
        trouble(serving)
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


@pytest.mark.parametrize("policy", ["default", "paper"])
def test_a_server_that_went_through_everything_decided_what_its_code_decides(
    tmp_path: Path, start: Start, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(tmp_path, start, policy) as serving:
        under_load(serving)
    journal = tmp_path / "journal"
    steps = list(read_journal(journal))
    events = [event for step in steps for event in step.events]
    kinds = {type(event) for event in events}
    effects = [effect for step in steps for effect in step.effects]

    assert {WorkerLost, WorkerJoined, GatewayLost, ModelRemoved, QuotasSet} <= kinds
    assert sum(isinstance(event, WorkerLost) for event in events) >= 4
    requests = [event for event in events if isinstance(event, Request)]
    assert {request.gateway for request in requests} == {"gateway-0", "gateway-1"}
    assert len(requests) > 500
    assert any(isinstance(effect, Quarantined) and effect.why for effect in effects)
    assert any(getattr(effect, "reason", None) is Reason.TENANT_QUOTA for effect in effects)
    assert any(getattr(effect, "outcome", None) is Outcome.OK for effect in effects)

    replayed = replay(journal, checks=True)
    assert replayed.agrees, replayed.difference
    assert replayed.decisions == len(steps)
    assert replayed.runs[0].other_build == ""
    assert clockwork(["simulate", "--replay", str(journal)]) == 0
    assert f"the same: {len(steps):,} decisions agree" in capsys.readouterr().out


def test_a_killed_controller_leaves_two_runs_and_both_replay(tmp_path: Path, start: Start) -> None:
    body = x_json([0.0] * WIDE, **SLO)
    with served(tmp_path, start, "default") as serving:
        controller = serving.server.pid("controller")
        assert controller is not None
        for _ in range(30):
            assert ask(serving, "/v2/models/m0/infer", body) == 200
        time.sleep(1)  # the journal is written four times a second
        os.kill(controller, signal.SIGKILL)
        until("a controller is back", lambda: serving.server.pid("controller") not in {None, controller}, 60)
        until("it answers", lambda: ask(serving, "/v2/models/m0/infer", body) == 200, RECOVERY_S)

    replayed = replay(tmp_path / "journal")

    assert replayed.agrees, replayed.difference
    assert len(replayed.runs) == 2
    assert [run.effects > 3 for run in replayed.runs] == [True, True]
