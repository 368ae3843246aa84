"""A gateway with Triton's status codes, over both protocols."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from clockwork_client import Client, Expired, Failed, NotServing, Rejected
from clockwork_serve.messages import AdmissionQuery, AdmissionReply, Answer, Outcome, Reason, Request
from clockwork_serve.units import KIB, ms
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import IDENT_JSON, INFER, Found, X, ask, get, post

ENDS = [
    (Outcome.REJECTED, Reason.QUEUE_FULL, 503, Rejected),
    (Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE, 503, Rejected),
    (Outcome.REJECTED, Reason.TENANT_QUOTA, 503, Rejected),
    (Outcome.REJECTED, Reason.DRAINING, 503, NotServing),
    (Outcome.EXPIRED, Reason.LATE, 503, Expired),
    (Outcome.EXPIRED, Reason.NONE, 503, Expired),
    (Outcome.FAILED, Reason.MODEL_RAISED, 500, Failed),
]
OF_HTTP = {503: grpc.StatusCode.UNAVAILABLE, 500: grpc.StatusCode.INTERNAL}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), grpc_port=0, triton=True) as found:
        yield found


def end_with(gateway: RunningGateway, outcome: Outcome, reason: Reason) -> None:
    def answered(request: Request) -> Answer:
        return gateway.controller.answer(
            request, outcome=outcome, reason=reason, message="this is why", retry_after_ns=ms(12.5)
        )

    gateway.controller.on_request = answered


@pytest.mark.parametrize(("outcome", "reason", "status", "raised"), ENDS)
def test_http_has_triton_s_status_and_our_fields(
    gateway: RunningGateway, outcome: Outcome, reason: Reason, status: int, raised: type[Exception]
) -> None:
    end_with(gateway, outcome, reason)
    found = ask(gateway, post(INFER, IDENT_JSON))
    assert found.status == status
    assert (found.json["outcome"], found.json["reason"]) == (outcome, reason)
    assert found.json["retry_after_ms"] == 12.5
    assert found.headers["retry-after"] in {"1", "2"}


@pytest.mark.parametrize(("outcome", "reason", "status", "raised"), ENDS)
def test_grpc_has_triton_s_status_and_our_trailers(
    gateway: RunningGateway, outcome: Outcome, reason: Reason, status: int, raised: type[Exception]
) -> None:
    end_with(gateway, outcome, reason)
    request = service_pb2.ModelInferRequest(model_name="ident", raw_input_contents=[X.tobytes()])
    request.inputs.add(name="X", datatype="FP32", shape=[1, 2])
    with grpc.insecure_channel(gateway.grpc_url) as channel, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
    told: Any = caught.value
    assert told.code() is OF_HTTP[status]
    trailers = dict(told.trailing_metadata())
    assert (trailers["clockwork-outcome"], trailers["clockwork-reason"]) == (outcome, reason)
    assert trailers["clockwork-retry-after-ms"] == "12.500"


@pytest.mark.parametrize(("outcome", "reason", "status", "raised"), ENDS)
def test_our_client_raises_what_it_always_does(
    gateway: RunningGateway, outcome: Outcome, reason: Reason, status: int, raised: type[Exception]
) -> None:
    end_with(gateway, outcome, reason)
    with Client(gateway.http_url) as client, pytest.raises(raised) as caught:
        client.infer("ident", {"X": X})
    assert type(caught.value) is raised
    assert caught.value.retry_after_s == 0.0125


def test_outcomes_of_the_gateway_itself_have_triton_s_status(gateway: RunningGateway) -> None:
    gateway.controller.on_request = lambda request: None
    body = b'{"parameters":{"slo_ms":500},' + IDENT_JSON[1:]
    found = ask(gateway, post(INFER, body))
    assert (found.status, found.json["outcome"]) == (503, "expired")
    (request,) = gateway.controller.requests
    answer = gateway.controller.answer(request, outcome=Outcome.EXPIRED)
    gateway.do(lambda: gateway.controller.send(answer))


def test_an_infeasible_large_body_gets_503_before_it_is_received(gateway: RunningGateway) -> None:
    def infeasible(announced: AdmissionQuery) -> AdmissionReply:
        return AdmissionReply(
            announced_id=announced.announced_id, gateway=announced.gateway, retry_after_ns=ms(7),
            reason=Reason.WOULD_MISS_DEADLINE,
        )  # fmt: skip

    gateway.controller.on_admission_query = infeasible
    sent = post("/v2/models/any/infer", np.zeros(100 * KIB, np.uint8).tobytes(), "x-slo-ms: 60000")
    with gateway.connect() as client:
        client.sendall(sent[:-1])
        found = Found(client.recv(65536))
    assert (found.status, found.json["reason"]) == (503, "would_miss_deadline")


def test_all_other_codes_stay(gateway: RunningGateway) -> None:
    assert ask(gateway, post(INFER, b"{")).status == 400, "500 would say that the server is broken"
    assert ask(gateway, post("/v2/models/nope/infer", IDENT_JSON)).status == 404
    assert ask(gateway, get("/v2/models/nope/ready")).status == 404
    assert ask(gateway, get("/v2/health/ready")).status == 200
