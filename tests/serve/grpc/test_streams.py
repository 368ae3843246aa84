"""gRPC streams with stock clients: order, cancellation of all open requests, reflection."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from google.protobuf import descriptor_pool, message_factory
from tritonclient.utils import InferenceServerException

from clockwork_serve.messages import Answer, Outcome, Request
from clockwork_serve.oip.protobuf import HEALTH_SERVICE, INFERENCE_SERVICE, REFLECTION_SERVICE, rpcs
from tests.serve.gateway.running import RunningGateway

X = np.array([[1.5, -2]], np.float32)
REFLECT = rpcs(REFLECTION_SERVICE)["ServerReflectionInfo"]


@pytest.fixture
def ends(client: Any) -> Iterator[queue.Queue[Any]]:
    """What the callback of an open stream received."""
    found: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: found.put((result, error)))
    yield found
    client.stop_stream(cancel_requests=True)


def send(client: Any, model: str, request_id: str, **more: Any) -> None:
    tensor = tritonclient.grpc.InferInput("X", list(X.shape), "FP32")
    tensor.set_data_from_numpy(X)
    client.async_stream_infer(model, [tensor], request_id=request_id, **more)


def test_responses_are_in_the_requests_order(client: Any, ends: queue.Queue[Any]) -> None:
    for request_id in ("0", "1", "2"):
        send(client, "ident", request_id)
    send(client, "nope", "3")
    send(client, "ident", "4")
    told = [ends.get(timeout=60) for _ in range(5)]
    assert [result.get_response().id for result, _ in (*told[:3], told[4])] == ["0", "1", "2", "4"]
    np.testing.assert_array_equal(told[0][0].as_numpy("Y"), X)
    assert "unknown model: 'nope'" in str(told[3][1])


def test_requests_of_one_stream_run_concurrently(
    gateway: RunningGateway, client: Any, ends: queue.Queue[Any]
) -> None:
    gateway.controller.on_request = lambda request: None
    for request_id in ("first", "second", "third"):
        send(client, "ident", request_id)
    gateway.until(lambda: len(gateway.controller.requests) == 3)

    def answer_backwards() -> None:
        controller = gateway.controller
        controller.send(*(controller.echo(request) for request in reversed(controller.requests)))

    gateway.do(answer_backwards)
    told = [ends.get(timeout=60) for _ in range(3)]
    assert [result.get_response().id for result, _ in told] == ["first", "second", "third"]


def cancelled(gateway: RunningGateway, count: int) -> None:
    """Wait until all requests were cancelled, and end them."""
    controller = gateway.controller
    gateway.until(lambda: len(controller.cancels) == count)
    sent = [request.request_id for request in controller.requests]
    assert sorted(cancel.request_id for cancel in controller.cancels) == sorted(sent)
    answers = [controller.answer(request, outcome=Outcome.CANCELLED) for request in controller.requests]
    gateway.do(lambda: controller.send(*answers))


def test_cancelling_a_stream_cancels_its_requests(gateway: RunningGateway, client: Any) -> None:
    gateway.controller.on_request = lambda request: None
    ends: queue.Queue[Any] = queue.Queue()
    client.start_stream(callback=lambda result, error: ends.put((result, error)))
    for request_id in ("first", "second", "third"):
        send(client, "ident", request_id)
    gateway.until(lambda: len(gateway.controller.requests) == 3)
    client.stop_stream(cancel_requests=True)
    result, error = ends.get(timeout=60)
    assert result is None
    assert isinstance(error, InferenceServerException)
    assert error.status() == "StatusCode.CANCELLED"
    cancelled(gateway, 3)


def test_a_stream_s_deadline_cancels_its_requests(gateway: RunningGateway, client: Any) -> None:
    controller, pending = gateway.controller, gateway.servers.gateway._pending
    controller.on_request = lambda request: None
    ends: queue.Queue[Any] = queue.Queue()
    timeout_s = 1.5
    while gateway.do(lambda: len(controller.requests)) < 2:  # on a busy machine they do not get there in time
        client.start_stream(
            callback=lambda result, error: ends.put((result, error)), stream_timeout=timeout_s
        )
        send(client, "ident", "first")
        send(client, "ident", "second")
        _, error = ends.get(timeout=60)
        while error.status() is None:  # a client that is late hears first that its requests' time is up, too
            assert "deadline" in error.message()
            _, error = ends.get(timeout=60)
        assert error.status() == "StatusCode.DEADLINE_EXCEEDED"
        client.stop_stream()
        timeout_s *= 2

    def over() -> bool:
        gone = {cancel.request_id for cancel in controller.cancels}
        gone |= {request_id for request_id, one in pending.items() if one.expired}
        return gone == {one.request_id for one in controller.requests}

    gateway.until(over)
    answers = [controller.answer(request, outcome=Outcome.CANCELLED) for request in controller.requests]
    gateway.do(lambda: controller.send(*answers))


def test_a_client_that_wants_a_status_gets_one_and_the_stream_ends(
    gateway: RunningGateway, client: Any
) -> None:
    ends: queue.Queue[Any] = queue.Queue()
    client.start_stream(
        callback=lambda result, error: ends.put((result, error)), headers={"triton_grpc_error": "true"}
    )
    held: list[Request] = []

    def hold(request: Request) -> Answer | None:
        held.append(request)
        return None

    gateway.controller.on_request = hold
    send(client, "nope", "wrong")
    send(client, "ident", "behind it")
    _, error = ends.get(timeout=60)
    assert (error.status(), "unknown model" in error.message()) == ("StatusCode.NOT_FOUND", True)
    client.stop_stream()
    # Later messages were not sent, or were dropped.
    gateway.until(lambda: len(gateway.controller.cancels) == len(held))
    answers = [gateway.controller.answer(request, outcome=Outcome.CANCELLED) for request in held]
    gateway.do(lambda: gateway.controller.send(*answers))


@pytest.mark.parametrize("wanted", [True, False])
def test_the_only_response_is_the_final_one(client: Any, ends: queue.Queue[Any], *, wanted: bool) -> None:
    send(client, "ident", "1", enable_empty_final_response=wanted)
    result, error = ends.get(timeout=60)
    assert error is None
    assert result.get_response().parameters["triton_final_response"].bool_param


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_has_two_names(channel: Any, version: str) -> None:
    call = channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=REFLECT.request.SerializeToString,
        response_deserializer=REFLECT.response.FromString,
    )
    asked = [REFLECT.request(list_services=""), REFLECT.request(file_by_filename="nope")]
    listed, missing = call(iter(asked))
    names = [service.name for service in listed.list_services_response.service]
    assert names == [HEALTH_SERVICE, REFLECTION_SERVICE, INFERENCE_SERVICE]
    assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_stock_reflection_client_can_call_what_it_found(channel: Any) -> None:
    stock = pytest.importorskip("grpc_reflection.v1alpha.proto_reflection_descriptor_database")
    database = stock.ProtoReflectionDescriptorDatabase(channel)
    assert set(database.get_services()) == {HEALTH_SERVICE, REFLECTION_SERVICE, INFERENCE_SERVICE}
    service = descriptor_pool.DescriptorPool(database).FindServiceByName(INFERENCE_SERVICE)
    method = service.methods_by_name["ModelMetadata"]
    request, response = map(message_factory.GetMessageClass, (method.input_type, method.output_type))
    call = channel.unary_unary(
        f"/{INFERENCE_SERVICE}/ModelMetadata",
        request_serializer=request.SerializeToString,
        response_deserializer=response.FromString,
    )
    assert call(request(name="ident")).inputs[0].name == "X"


def test_an_invalid_message_ends_its_stream_only(
    gateway: RunningGateway, channel: Any, client: Any, ends: queue.Queue[Any]
) -> None:
    call = channel.stream_stream(f"/{INFERENCE_SERVICE}/ModelStreamInfer")
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter([b"\xff\xff\xff"])))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    send(client, "ident", "mine")
    assert ends.get(timeout=60)[0].get_response().id == "mine"


@pytest.mark.parametrize("method", ["ModelInfer", "ModelReady", "ModelMetadata", "RepositoryModelLoad"])
def test_a_text_that_is_not_utf_8_is_invalid(channel: Any, method: str) -> None:
    name = b"\xff\xfe"
    call = channel.unary_unary(f"/{INFERENCE_SERVICE}/{method}")
    with pytest.raises(grpc.RpcError) as caught:
        # The model's name is the first field, but of RepositoryModelLoad, where it is the second.
        call(
            (b"\x12" if method == "RepositoryModelLoad" else b"\x0a") + bytes([len(name)]) + name, timeout=60
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_stream_may_end_without_a_message(channel: Any) -> None:
    call = channel.stream_stream(f"/{INFERENCE_SERVICE}/ModelStreamInfer")
    assert list(call(iter([]))) == []
