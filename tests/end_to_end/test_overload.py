"""More work than a device can do: a no that comes in time, and no answer that comes late."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from benchmarks.overload import __main__ as overload
from harness import repositories
from harness.http_load import header_of, infer_message, open_loop, run
from harness.serving import Serving, total, until
from tests.end_to_end.conftest import call, x_json
from tests.timing import Timing

Start = Callable[..., AbstractContextManager[Serving]]

TOLD_BY_NS = 100_000_000
"""Far above what is promised (10 ms), for machines are shared; far below a timeout."""


def test_hopeless_requests_hear_at_once_and_the_rest_is_served(
    tmp_path: Path, start: Start, timing: Timing
) -> None:
    root, journal = tmp_path / "models", tmp_path / "journal"
    repositories.emulated(root, overload.MODEL, {1: 400})
    with start(root, device="emulated", journal=journal) as serving:
        shots = overload.shots(serving.http_url, rate=7.5, seconds=8, slos_ms=(80, 520, 1040), seed=3)
        samples = overload.load(serving, shots)

        def received() -> float:
            return total(serving.metrics(), "clockwork_gateway_received_total")

        until("the gateway told of all", lambda: received() == len(samples) + 1)
        metrics = serving.metrics()
    found = overload.judge(samples, overload.runs_of(journal, samples))

    by_summary = total(metrics, "clockwork_gateway_refused_by_summary_total")
    refused = total(metrics, "clockwork_requests_total", reason="would_miss_deadline")
    assert refused + by_summary == len(found.lags_ns)
    # On a busy machine the gateway may read a request after its deadline, which it then answers by itself.
    answered_by_gateway = total(metrics, "clockwork_gateway_requests_total")
    assert total(metrics, "clockwork_requests_received_total") + answered_by_gateway == len(samples) + 1
    with timing.judged():
        assert not found.other_ends
        assert len(found.late_ns) <= 1
        assert sorted(found.lags_ns)[int(0.9 * len(found.lags_ns))] < TOLD_BY_NS
        assert found.good >= 0.7 * found.best


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Serving]:
    """A server with a model that takes 200 ms and one that takes three seconds, through two gateways."""
    root = tmp_path_factory.mktemp("slow") / "models"
    repositories.emulated(root, overload.MODEL, {1: 200})
    repositories.emulated(root, "slowest", {1: 3000})
    with start(root, device="emulated", gateways=2) as serving:
        # Each of the two speaks for itself, and either may take a connection.
        assert {call(serving.http_url, "/v2/health/ready").status for _ in range(20)} == {200}
        yield serving


def test_a_refusal_says_when_to_come_back(slow: Serving) -> None:
    shots = overload.shots(slow.http_url, rate=40, seconds=1, slos_ms=(260,), seed=3)
    report = run(open_loop(slow.http_url, shots))
    refused = [sample for sample in report.samples if sample.status == 429]
    assert refused
    assert all(header_of(sample, "retry-after") for sample in refused)


def test_an_slo_that_no_schedule_could_meet_is_refused_at_once(slow: Serving) -> None:
    response = call(slow.http_url, "/v2/models/slowest/infer", x_json([0.0] * 4), {"x-slo-ms": "2900"})
    assert response.status == 429
    assert response.json["reason"] == "would_miss_deadline"


def test_a_grpc_deadline_is_a_deadline(slow: Serving) -> None:
    tensor = tritonclient.grpc.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 4), np.float32))
    client = tritonclient.grpc.InferenceServerClient(slow.grpc_url)
    with client, pytest.raises(InferenceServerException) as caught:
        client.infer(overload.MODEL, [tensor], client_timeout=0.1)
    assert caught.value.status() in ("StatusCode.RESOURCE_EXHAUSTED", "StatusCode.DEADLINE_EXCEEDED")


def test_a_client_that_goes_away_is_counted_and_makes_room(slow: Serving) -> None:
    def cancelled() -> float:
        return total(slow.metrics(), "clockwork_requests_total", outcome="cancelled")

    def received() -> float:
        return total(slow.metrics(), "clockwork_requests_received_total")

    before, received_before = cancelled(), received()
    host, port = slow.http_url.removeprefix("http://").split(":")
    message = infer_message(slow.http_url, overload.MODEL, overload.X, slo_ms=60_000)
    with ExitStack() as clients:
        for _ in range(50):  # ten seconds of work
            client = clients.enter_context(socket.create_connection((host, int(port))))
            client.sendall(message)
        until("most have come", lambda: received() >= received_before + 40)
    until("all ended", lambda: total(slow.metrics(), "clockwork_requests_open") == 0)
    assert cancelled() - before >= 10


def test_gateways_share_the_port_and_the_books(slow: Serving) -> None:
    before = total(slow.metrics(), "clockwork_requests_received_total")
    for _ in range(6):
        assert call(slow.http_url, f"/v2/models/{overload.MODEL}/infer", x_json([0.0] * 4)).status == 200
    metrics = slow.metrics()
    assert total(metrics, "clockwork_requests_received_total") == before + 6
    assert total(metrics, "clockwork_answers_unmatched_total") == 0
