"""The controller dies, alone or with others: requests that can wait are answered, nothing is loaded again."""

from __future__ import annotations

import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from clockwork_serve.serve.supervisor.server import RunningServer, running_server
from tests.end_to_end.steady import how, steady
from tests.serve.onnx_models import affine, put
from tests.serve.supervisor.servers import config, infer, until
from tests.timing import Timing

pytestmark = [pytest.mark.system, pytest.mark.slow]

MODELS = ("m0", "m1", "m2", "m3")
SLACK_MS = 150
"""These machines are shared; 50 ms after the deadline are promised."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("place")
    for at, name in enumerate(MODELS):
        put(root / "repository", name, affine(at))
    return root


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[RunningServer]:
    with running_server(config(place, gateways=2)) as running:
        yield running


@pytest.fixture(autouse=True)
def _well(server: RunningServer) -> None:
    """Each test finds a server that is whole, has all weights and has forgotten earlier deaths."""
    server.server.supervisor.reset_backoff("")
    server.wait_ready(60)
    for name in MODELS:
        infer_zero(server, name)


def infer_zero(server: RunningServer, model: str) -> None:
    infer(server, model, np.zeros((1, 64), np.float32))


def answers(server: RunningServer, model: str) -> bool:
    try:
        infer_zero(server, model)
    except urllib.error.HTTPError:
        return False
    return True


def kill(server: RunningServer, *names: str) -> dict[str, int]:
    """SIGKILL, as close to each other as can be; who they were."""
    pids = {name: server.pid(name) for name in names}
    known = {name: pid for name, pid in pids.items() if pid is not None}
    assert len(known) == len(names), pids
    for pid in known.values():
        os.kill(pid, signal.SIGKILL)
    return known


def back(server: RunningServer, dead: dict[str, int]) -> None:
    """Return once others are there in their place, and requests are served."""
    until(lambda: all(server.pid(name) not in (None, pid) for name, pid in dead.items()))
    server.wait_ready(60)


def open_requests(server: RunningServer) -> int:
    return server.counters().open


def test_no_request_that_can_wait_fails_when_the_controller_dies_again_and_again(
    server: RunningServer, timing: Timing
) -> None:
    workers = server.pid("worker-cpu:0")
    with steady(server.http_port, server.grpc_port, MODELS) as load:
        for _ in range(3):
            time.sleep(0.7)
            back(server, kill(server, "controller"))
            server.server.supervisor.reset_backoff("controller")
        time.sleep(0.5)
        ends = load.stop()
    waited = [end for end in ends if not end.good]
    # What comes while there is no controller is told so at once; nothing else is refused, nothing lost.
    assert {end.how for end in waited} <= {"503", "UNAVAILABLE"}, how(ends)
    reasons = ("not_serving: not ready: ", "not_serving: no worker is up")
    assert all(end.why.startswith(reasons) for end in waited), how(ends)
    assert all(end.retry_after for end in waited), how(ends)
    with timing.judged():
        assert max(end.took_ms for end in waited) < SLACK_MS
        assert len([end for end in ends if end.good]) > 200
    assert server.pid("worker-cpu:0") == workers
    counters = server.counters()
    assert sum(model.loads for model in counters.models.values()) == 0, "loaded again"
    assert counters.unmatched == 0
    assert len([model for model in counters.models.values() if model.resident]) == len(MODELS)
    until(lambda: open_requests(server) == 0)


def test_requests_end_by_their_deadlines_whoever_dies(server: RunningServer, timing: Timing) -> None:
    with steady(server.http_port, server.grpc_port, MODELS, slo_ms=150) as load:
        for names in (["controller"], ["worker-cpu:0"], ["worker-cpu:0", "controller"]):
            time.sleep(0.5)
            back(server, kill(server, *names))
        ends = load.stop()
    assert {end.how for end in ends} <= {
        "200", "429", "503", "504", "OK", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"
    }, how(ends)  # fmt: skip
    with timing.judged():
        assert max(end.took_ms for end in ends) < 150 + 50 + SLACK_MS
    until(lambda: open_requests(server) == 0)


@pytest.mark.parametrize("apart_ms", [0, 3, 10])
def test_a_worker_and_the_controller_die_together(server: RunningServer, apart_ms: int) -> None:
    with steady(server.http_port, server.grpc_port, MODELS) as load:
        time.sleep(0.3)
        dead = kill(server, "worker-cpu:0")
        time.sleep(apart_ms / 1e3)
        dead |= kill(server, "controller")
        back(server, dead)
        time.sleep(0.3)
        ends = load.stop()
    bad = [end for end in ends if not end.good]
    assert {end.how for end in bad} <= {"503", "UNAVAILABLE", "429", "RESOURCE_EXHAUSTED"}, how(ends)
    assert ends[-1].good
    until(lambda: open_requests(server) == 0)


def test_a_gateway_and_the_controller_die_together(server: RunningServer) -> None:
    with steady(server.http_port, server.grpc_port, MODELS, each=4) as load:
        time.sleep(0.3)
        back(server, kill(server, "gateway-1", "controller"))
        time.sleep(0.5)
        ends = load.stop()
    refused = {"503", "UNAVAILABLE"}
    torn = {"RemoteDisconnected", "ConnectionResetError", "ConnectionRefusedError", "BrokenPipeError"}
    assert {end.how for end in ends if not end.good} <= refused | torn, how(ends)
    assert len([end for end in ends if end.how in torn]) < 16
    until(lambda: open_requests(server) == 0)


def test_a_worker_dies_while_it_joins_the_next_controller(server: RunningServer) -> None:
    with steady(server.http_port, server.grpc_port, MODELS) as load:
        time.sleep(0.3)
        dead = kill(server, "controller")
        until(lambda: server.pid("controller") not in (None, dead["controller"]))
        for wait_s in (0.25, 0.0):
            time.sleep(wait_s)
            if (pid := server.pid("worker-cpu:0")) is not None:
                dead["worker-cpu:0"] = pid
                with suppress(ProcessLookupError):  # it may die of the first kill only now
                    os.kill(pid, signal.SIGKILL)
        back(server, dead)
        time.sleep(0.3)
        ends = load.stop()
    assert ends[-1].good
    assert {end.how for end in ends if not end.good} <= {
        "503", "UNAVAILABLE", "429", "RESOURCE_EXHAUSTED", "500", "INTERNAL"
    }, how(ends)  # fmt: skip
    until(lambda: open_requests(server) == 0)


def test_a_controller_that_dies_as_soon_as_it_starts_is_started_ever_later_and_that_is_said(
    server: RunningServer, caplog: pytest.LogCaptureFixture, timing: Timing
) -> None:
    worker, pid = server.pid("worker-cpu:0"), server.pid("controller")
    assert pid is not None
    killed_s: list[float] = []
    for _ in range(6):
        os.kill(pid, signal.SIGKILL)
        killed_s.append(time.monotonic())
        until(partial(another, server, "controller", pid), 60)
        with timing.judged():  # it is not ready yet
            assert health(server) == 503
        pid = server.pid("controller")
        assert pid is not None
    with timing.judged():  # each was killed soon after it started
        assert killed_s[-1] - killed_s[-2] > 0.7, killed_s
        assert "controller ended: killed by SIGKILL; restarting in 0.8 s" in caplog.text
        assert "controller keeps ending at once" in caplog.text
    until(lambda: health(server) == 200)
    assert server.pid("worker-cpu:0") == worker
    until(partial(answers, server, "m0"))  # the other gateway may hear of it a moment later
    assert sum(model.loads for model in server.counters().models.values()) == 0


def another(server: RunningServer, name: str, before: int) -> bool:
    return server.pid(name) not in (None, before)


def health(server: RunningServer) -> int:
    try:
        with urllib.request.urlopen(f"{server.http_url}/v2/health/ready", timeout=60) as reply:
            status: int = reply.status
            return status
    except urllib.error.HTTPError as refused:
        refused.close()
        return refused.code
