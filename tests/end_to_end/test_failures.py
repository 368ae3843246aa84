"""Processes that die: each request still ends once, and the server is whole again soon after."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

from harness import repositories
from harness.http_load import closed_loop, infer_message, run
from harness.serving import Serving, total, until
from tests.end_to_end.conftest import MOODY, WIDE, call, x_json

Start = Callable[..., AbstractContextManager[Serving]]

RECOVERY_S = 30.0
"""Far above what is promised (1.5 s): these machines are shared."""


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Serving]:
    """A server whose processes may be killed."""
    root = tmp_path_factory.mktemp("mortal") / "models"
    repositories.python_model(root, "moody", MOODY)
    for index in range(4):
        repositories.one_matrix(root, f"m{index}", repositories.matrix_of(index, WIDE, 16))
    with start(root) as serving:
        yield serving


def works(serving: Serving) -> bool:
    """Whether a request is answered now."""
    body = x_json([0.0] * WIDE, parameters={"slo_ms": 2000})
    return call(serving.http_url, "/v2/models/m0/infer", body).status == 200


def test_a_killed_worker_costs_no_client_its_one_response(mortal: Serving) -> None:
    message = infer_message(mortal.http_url, "m1", [("x", "FP32", (1, WIDE), bytes(4 * WIDE))], slo_ms=3000)
    until("the server works", lambda: works(mortal), RECOVERY_S)
    lost_before = total(mortal.metrics(), "clockwork_workers_lost_total")
    victim = mortal.worker_pid()

    def messages(index: int) -> bytes:
        if index == 800:
            os.kill(victim, signal.SIGKILL)
        return message

    report = run(closed_loop(mortal.http_url, messages, requests=2400, connections=40))
    until("the worker is back", lambda: works(mortal), RECOVERY_S)

    assert len(report.samples) == 2400
    assert report.unanswered == 0
    assert report.unexpected_bytes == 0
    assert report.ends()["200"] >= 400
    assert mortal.worker_pid() != victim
    metrics = mortal.metrics()
    assert total(metrics, "clockwork_workers_lost_total") == lost_before + 1
    assert total(metrics, "clockwork_requests_open") == 0
    assert total(metrics, "clockwork_requests_received_total") == total(metrics, "clockwork_requests_total")
    assert total(metrics, "clockwork_answers_unmatched_total") == 0


def test_a_model_that_crashes_its_process_harms_no_other(mortal: Serving) -> None:
    until("the server works", lambda: works(mortal), RECOVERY_S)
    victim = mortal.worker_pid()
    body = x_json([666.0, 0.0, 0.0, 0.0], parameters={"slo_ms": 5000})
    response = call(mortal.http_url, "/v2/models/moody/infer", body)
    assert response.status in (429, 500, 503, 504), response.json
    assert response.json["error"]
    until("others are served again", lambda: works(mortal), RECOVERY_S)
    assert mortal.worker_pid() != victim


def test_a_killed_controller_is_replaced(mortal: Serving) -> None:
    until("the server works", lambda: works(mortal), RECOVERY_S)
    victim = mortal.server.pid("controller")
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    response = call(mortal.http_url, "/v2/models/m0/infer", x_json([0.0] * WIDE))
    assert response.status in (200, 429, 503)
    until("the server works again", lambda: works(mortal), RECOVERY_S)
    assert mortal.server.pid("controller") != victim


def test_a_killed_gateway_is_replaced(mortal: Serving) -> None:
    until("the server works", lambda: works(mortal), RECOVERY_S)
    victim = mortal.server.pid("gateway-0")
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    until("the gateway is back", lambda: mortal.server.pid("gateway-0") not in (None, victim), RECOVERY_S)

    def works_again() -> bool:
        try:
            return works(mortal)
        except OSError:
            return False

    until("the server works again", works_again, RECOVERY_S)
    until("nothing is open", lambda: total(mortal.metrics(), "clockwork_requests_open") == 0)
