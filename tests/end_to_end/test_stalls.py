"""A gateway that is stopped for a while: what waited for it is older for that, and late is never good."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, ModelInferRequest
from harness import repositories
from harness.http_load import infer_message
from harness.serving import Serving, serve, until
from harness.serving import total as total_of
from tests.timing import Timing

SLO_MS, STOP_S = 300, 0.8
X = bytes(16)


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("s")
    repositories.emulated(folder / "models", "quick", {1: 1})
    repositories.emulated(folder / "models", "slow", {1: 150})
    with serve(folder / "models", device="emulated") as found:
        yield found


@contextmanager
def stopped(serving: Serving) -> Iterator[None]:
    """For long enough that whatever is inside is late."""
    pid = serving.server.pid("gateway-0")
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
        time.sleep(STOP_S)
    finally:
        os.kill(pid, signal.SIGCONT)


def connect(serving: Serving) -> socket.socket:
    host, _, port = serving.http_url.partition("//")[2].partition(":")
    return socket.create_connection((host, int(port)), timeout=60)


def message(serving: Serving, model: str) -> bytes:
    return infer_message(serving.http_url, model, [("x", "FP32", (1, 4), X)], slo_ms=SLO_MS)


def ended(serving: Serving) -> dict[str, int]:
    """How many requests ended how, by all books together, once nothing is open."""

    def counted() -> dict[str, int]:
        page = serving.metrics()
        assert total_of(page, "clockwork_requests_received_total") == total_of(
            page, "clockwork_requests_total"
        ) + total_of(page, "clockwork_requests_open")
        if total_of(page, "clockwork_requests_open"):
            return {}
        names = ("clockwork_requests_total", "clockwork_gateway_requests_total")
        return {
            outcome: int(sum(total_of(page, name, outcome=outcome) for name in names))
            for outcome in ("ok", "expired")
        }

    until("nothing is open", counted)
    return counted()


def status(client: socket.socket) -> int:
    return int(client.recv(1 << 16)[9:12])


def test_what_came_while_the_gateway_was_stopped_has_expired(serving: Serving) -> None:
    before = ended(serving)
    with connect(serving) as known, grpc.insecure_channel(serving.grpc_url) as channel:
        known.sendall(message(serving, "quick"))
        status(known)
        infer: Any = channel.unary_unary(
            f"/{INFERENCE_SERVICE}/ModelInfer", request_serializer=ModelInferRequest.SerializeToString
        )
        tensor = {"name": "x", "datatype": "FP32", "shape": [1, 4]}
        request = ModelInferRequest(model_name="quick", inputs=[tensor], raw_input_contents=[X])
        infer(request, timeout=60, metadata=(("x-slo-ms", "20000"),))
        good = ended(serving)["ok"] - before["ok"]
        with stopped(serving):
            known.sendall(message(serving, "quick"))
            new = connect(serving)
            new.sendall(message(serving, "quick"))
            call = infer.future(request, timeout=60, metadata=(("x-slo-ms", str(SLO_MS)),))
        with new:
            assert (status(known), status(new)) == (504, 504)
        assert call.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert ("clockwork-outcome", "expired") in [tuple(one) for one in call.trailing_metadata()]
    after = ended(serving)
    assert after["ok"] - before["ok"] == good
    assert after["expired"] - before["expired"] >= 3


def test_an_answer_that_waited_for_a_stopped_gateway_is_none(serving: Serving, timing: Timing) -> None:
    before = ended(serving)
    with connect(serving) as client:
        client.sendall(message(serving, "slow"))
        time.sleep(0.05)  # it is on its way to the device, if the machine is not too busy
        with stopped(serving):
            pass
        with timing.judged():  # it was stopped before there was an answer
            assert status(client) == 504
    after = ended(serving)
    assert (after["ok"], after["expired"]) == (before["ok"], before["expired"] + 1)
