"""More work than a device can do: a no that comes in time, and no answer that comes late."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from harness import repositories
from harness.http_load import Shot, header_of, infer_message, open_loop, poisson, reason_of, run
from harness.serving import Serving, total, until
from tests.end_to_end.conftest import call, x_json
from tests.timing import Timing

Start = Callable[..., AbstractContextManager[Serving]]

MODEL = "slow"
X = [("x", "FP32", (1, 4), bytes(16))]
TOLD_BY_NS = 100_000_000
"""Far above what it takes, for machines are shared; far below a timeout."""


def shots(url: str, rate: float, seconds: float, slos_ms: tuple[int, ...]) -> list[Shot]:
    """A Poisson process; each request has one of the SLOs, which is also its name."""
    rng = random.Random(3)
    messages = {slo: infer_message(url, MODEL, X, slo_ms=slo) for slo in slos_ms}
    return [
        Shot(at_ns, messages[slo], str(slo))
        for at_ns in poisson(rate, seconds, rng)
        for slo in [rng.choice(slos_ms)]
    ]


def test_hopeless_requests_hear_at_once_and_the_rest_is_served(
    tmp_path: Path, start: Start, timing: Timing
) -> None:
    root, seconds, service_s = tmp_path / "models", 8.0, 0.4
    repositories.emulated(root, MODEL, {1: 1e3 * service_s})
    with start(root, device="emulated") as serving:
        warm = run(
            open_loop(serving.http_url, [Shot(0, infer_message(serving.http_url, MODEL, X, slo_ms=5000))])
        )
        assert warm.samples[0].status == 200
        report = run(open_loop(serving.http_url, shots(serving.http_url, 7.5, seconds, (80, 520, 1040))))
        samples = report.samples

        def received() -> float:
            return total(serving.metrics(), "clockwork_gateway_received_total")

        until("the gateway told of all", lambda: received() == len(samples) + 1)
        metrics = serving.metrics()
    hopeless = [sample for sample in samples if sample.name == "80"]
    refusals = [sample for sample in samples if reason_of(sample) == "would_miss_deadline"]
    answers = [sample for sample in samples if sample.status == 200]

    by_summary = total(metrics, "clockwork_gateway_refused_by_summary_total")
    refused = total(metrics, "clockwork_requests_total", reason="would_miss_deadline")
    assert refused + by_summary == len(refusals)
    # On a busy machine the gateway may read a request after its deadline, which it then answers by itself.
    answered_by_gateway = total(metrics, "clockwork_gateway_requests_total")
    assert total(metrics, "clockwork_requests_received_total") + answered_by_gateway == len(samples) + 1
    with timing.judged():
        assert len(refusals) + len(answers) == len(samples)
        assert {sample.status for sample in hopeless} == {429}
        took_ns = sorted(sample.done_ns - sample.sent_ns for sample in hopeless)
        assert took_ns[int(0.9 * len(took_ns))] < TOLD_BY_NS
        late = [one for one in answers if one.done_ns - one.sent_ns > 1_000_000 * int(one.name)]
        assert len(late) <= 1
        assert len(answers) - len(late) >= 0.7 * seconds / service_s


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Serving]:
    """A server with a model that takes 200 ms and one that takes three seconds, through two gateways."""
    root = tmp_path_factory.mktemp("slow") / "models"
    repositories.emulated(root, MODEL, {1: 200})
    repositories.emulated(root, "slowest", {1: 3000})
    with start(root, device="emulated", gateways=2) as serving:
        # Each of the two speaks for itself, and either may take a connection.
        assert {call(serving.http_url, "/v2/health/ready").status for _ in range(20)} == {200}
        yield serving


def test_a_refusal_says_when_to_come_back(slow: Serving) -> None:
    report = run(open_loop(slow.http_url, shots(slow.http_url, 40, 1, (260,))))
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
        client.infer(MODEL, [tensor], client_timeout=0.1)
    assert caught.value.status() in ("StatusCode.RESOURCE_EXHAUSTED", "StatusCode.DEADLINE_EXCEEDED")


def test_a_client_that_goes_away_is_counted_and_makes_room(slow: Serving) -> None:
    def cancelled() -> float:
        return total(slow.metrics(), "clockwork_requests_total", outcome="cancelled")

    def received() -> float:
        return total(slow.metrics(), "clockwork_requests_received_total")

    before, received_before = cancelled(), received()
    host, port = slow.http_url.removeprefix("http://").split(":")
    message = infer_message(slow.http_url, MODEL, X, slo_ms=60_000)
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
        assert call(slow.http_url, f"/v2/models/{MODEL}/infer", x_json([0.0] * 4)).status == 200
    metrics = slow.metrics()
    assert total(metrics, "clockwork_requests_received_total") == before + 6
    assert total(metrics, "clockwork_answers_unmatched_total") == 0
