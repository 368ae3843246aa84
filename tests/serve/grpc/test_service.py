"""gRPC with a stock client, in one process with the server, under uvloop."""

from __future__ import annotations

import gc
import queue
import threading
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from clockwork_client.datatypes import encode_strings
from clockwork_serve.messages import Answer, Outcome, Question, Readiness, Reason, Reply, Request
from clockwork_serve.oip.protobuf import HEALTH_SERVICE, rpcs
from clockwork_serve.units import MIB, ms
from tests.serve.gateway.running import RunningGateway

X = np.array([[1.5, -2]], np.float32)
HEALTH = rpcs(HEALTH_SERVICE)


def tensor(name: str, data: Any, datatype: str) -> Any:
    found = tritonclient.grpc.InferInput(name, list(data.shape), datatype)
    found.set_data_from_numpy(data)
    return found


def test_a_stock_client_finds_everything(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("ident")
    metadata = client.get_server_metadata()
    assert (metadata.name, "statistics" in metadata.extensions) == ("clockwork-serve", True)
    model = client.get_model_metadata("ident", "1", as_json=True)
    assert model == {
        "name": "ident", "versions": ["1"], "platform": "onnxruntime_onnx",
        "inputs": [{"name": "X", "datatype": "FP32", "shape": ["-1", "2"]}],
        "outputs": [{"name": "Y", "datatype": "FP32", "shape": ["-1", "2"]}],
    }  # fmt: skip
    config = client.get_model_config("ident").config
    assert (config.name, config.max_batch_size, config.input[0].name) == ("ident", 8, "X")
    assert config.input[0].data_type == tritonclient.grpc.model_config_pb2.TYPE_FP32
    (entry,) = client.get_model_repository_index().models
    assert (entry.name, entry.state) == ("ident", "READY")
    (statistics,) = client.get_inference_statistics("ident").model_stats
    assert (statistics.inference_count, statistics.inference_stats.queue.ns) == (3, 5)


def test_a_stock_client_gets_its_answer(client: Any) -> None:
    found = client.infer("ident", [tensor("X", X, "FP32")], request_id="42")
    np.testing.assert_array_equal(found.as_numpy("Y"), X)
    response = found.get_response()
    assert (response.id, response.model_name, response.model_version) == ("42", "ident", "1")
    assert response.parameters["queue_ms"].double_param == 1.0
    assert response.parameters["batch_size"].int64_param == 1
    assert not response.parameters["cold_start"].bool_param


def test_tensors_of_all_kinds(client: Any) -> None:
    words = np.array([[b"a", b""]], object)
    assert client.infer("text", [tensor("X", words, "BYTES")]).as_numpy("Y").tolist() == words.tolist()
    half = np.array([[1.5, 2]], np.float16)
    np.testing.assert_array_equal(client.infer("half", [tensor("X", half, "FP16")]).as_numpy("Y"), half)
    a, b = (np.arange(16, dtype=np.int32).reshape(1, 16) + n for n in (0, 100))
    found = client.infer(
        "pair",
        [tensor("A", a, "INT32"), tensor("B", b, "INT32")],
        outputs=[tritonclient.grpc.InferRequestedOutput("D")],
    )
    np.testing.assert_array_equal(found.as_numpy("D"), b)
    assert found.as_numpy("C") is None
    large = np.random.default_rng(1).random(MIB - 1000).astype(np.float32)
    np.testing.assert_array_equal(client.infer("any", [tensor("X", large, "FP32")]).as_numpy("Y"), large)


def test_typed_contents(gateway: RunningGateway, channel: Any) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = service_pb2.ModelInferRequest(model_name="ident")
    request.inputs.add(name="X", datatype="FP32", shape=[1, 2], contents={"fp32_contents": [1.5, -2]})
    assert stub.ModelInfer(request).raw_output_contents == [X.tobytes()]


def test_many_strings_in_typed_contents(gateway: RunningGateway, channel: Any) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = service_pb2.ModelInferRequest(model_name="text")
    words = [b"a" * 3 * MIB, "é".encode() * 9]
    request.inputs.add(name="X", datatype="BYTES", shape=[1, 2], contents={"bytes_contents": words})
    assert stub.ModelInfer(request).raw_output_contents == [encode_strings(words)]
    (streamed,) = stub.ModelStreamInfer(iter([request]))
    assert streamed.infer_response.raw_output_contents == [encode_strings(words)]
    request.inputs[0].contents.bytes_contents.append(b"")
    (streamed,) = stub.ModelStreamInfer(iter([request]))
    assert "expected 2 elements in contents.bytes_contents" in streamed.error_message
    with pytest.raises(grpc.RpcError, match="expected 2 elements in contents"):
        stub.ModelInfer(request)
    request.model_name = "nobody"
    with pytest.raises(grpc.RpcError, match="'nobody' is not found"):
        stub.ModelInfer(request)


def test_a_stream_keeps_no_message_that_is_answered(gateway: RunningGateway, channel: Any) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = service_pb2.ModelInferRequest(model_name="text")
    words = [bytes(2 * MIB), bytes(2 * MIB), b""]
    request.inputs.add(name="X", datatype="BYTES", shape=[1, 2], contents={"bytes_contents": words})
    sent: queue.Queue[Any] = queue.Queue()
    responses = stub.ModelStreamInfer(iter(sent.get, None))

    def kept() -> list[int]:
        referred = [found for each in gc.get_objects() for found in gc.get_referents(each)]
        return [len(found) for found in referred if type(found) is bytes and len(found) > 3 * MIB]

    before = len(kept())
    for _ in range(2):
        sent.put(request)
        assert "expected 2 elements" in next(responses).error_message
        gateway.until(lambda: len(kept()) <= before)
    sent.put(None)
    assert not list(responses)


def test_slos(gateway: RunningGateway, client: Any) -> None:
    client.infer("ident", [tensor("X", X, "FP32")], timeout=30_000_000)
    client.infer("ident", [tensor("X", X, "FP32")], parameters={"slo_ms": 20_000})
    client.infer("ident", [tensor("X", X, "FP32")], headers={"x-slo-ms": "12000.5"})
    client.infer("ident", [tensor("X", X, "FP32")])
    client.infer("ident", [tensor("X", X, "FP32")], client_timeout=15, parameters={"slo_ms": 60_000})
    slos_ns = [request.deadline_ns - request.arrival_ns for request in gateway.controller.requests]
    assert slos_ns[:4] == [ms(30_000), ms(20_000), ms(12_000.5), ms(60_000)]
    assert ms(1) < slos_ns[4] <= ms(15_000)


TRACE = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize(
    ("sent", "found"),
    [
        ([], ""),
        ([("traceparent", f"00-{TRACE}")], TRACE),
        ([("traceparent", f"00-{TRACE}"), ("tracestate", "a=1"), ("tracestate", "b=2")], f"{TRACE} a=1,b=2"),
        ([("traceparent", f"00-{TRACE}"), ("traceparent", f"00-{TRACE[::-1]}")], ""),
        ([("traceparent", "nonsense"), ("tracestate", "a=1")], ""),
    ],
)
def test_the_trace_of_a_client_goes_with_its_request(
    gateway: RunningGateway, channel: Any, sent: list[tuple[str, str]], found: str
) -> None:
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = service_pb2.ModelInferRequest(model_name="ident", raw_input_contents=[X.tobytes()])
    request.inputs.add(name="X", datatype="FP32", shape=[1, 2])
    stub.ModelInfer(request, metadata=sent)

    assert [one.trace for one in gateway.controller.requests] == [found]


@pytest.mark.parametrize(
    ("outcome", "reason", "status"),
    [
        (Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Outcome.REJECTED, Reason.DRAINING, grpc.StatusCode.UNAVAILABLE),
        (Outcome.EXPIRED, Reason.LATE, grpc.StatusCode.DEADLINE_EXCEEDED),
        (Outcome.FAILED, Reason.MODEL_RAISED, grpc.StatusCode.INTERNAL),
    ],
)
def test_each_outcome_has_its_status_and_trailers(
    gateway: RunningGateway, channel: Any, outcome: Outcome, reason: Reason, status: Any
) -> None:
    def answered(request: Request) -> Answer:
        return gateway.controller.answer(
            request, outcome=outcome, reason=reason, message="this is why", retry_after_ns=ms(1.5)
        )

    gateway.controller.on_request = answered
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = service_pb2.ModelInferRequest(model_name="ident", raw_input_contents=[X.tobytes()])
    request.inputs.add(name="X", datatype="FP32", shape=[1, 2])
    with pytest.raises(grpc.RpcError) as caught:
        stub.ModelInfer(request)
    assert (caught.value.code(), caught.value.details()) == (status, f"{reason}: this is why")
    assert dict(caught.value.trailing_metadata()) == {
        "clockwork-outcome": outcome, "clockwork-reason": reason, "clockwork-retry-after-ms": "1.500",
        "clockwork-request-id": gateway.controller.requests[0].request_id,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "version", "data", "datatype", "parameters", "words"),
    [
        ("nope", "", X, "FP32", {}, "NOT_FOUND.*unknown model: 'nope'"),
        ("ident", "9", X, "FP32", {}, "NOT_FOUND.*'ident' version 9"),
        ("ident", "", X.astype(np.int32), "INT32", {}, "INVALID_ARGUMENT.*data-type is 'INT32'"),
        ("ident", "", np.zeros((9, 2), np.float32), "FP32", {}, "INVALID_ARGUMENT.*must be <= 8"),
        ("ident", "", X, "FP32", {"slo_ms": -1}, "INVALID_ARGUMENT.*'slo_ms'"),
    ],
)
def test_invalid_requests_get_an_explanation(
    gateway: RunningGateway,
    client: Any,
    model: str,
    version: str,
    data: Any,
    datatype: str,
    parameters: Any,
    words: str,
) -> None:
    with pytest.raises(InferenceServerException, match=f"(?s){words}"):
        client.infer(model, [tensor("X", data, datatype)], model_version=version, parameters=parameters)
    assert gateway.controller.requests == []


def test_unknown_models_are_not_found_everywhere(client: Any) -> None:
    for ask in (client.get_model_metadata, client.get_model_config, client.get_inference_statistics):
        with pytest.raises(InferenceServerException, match="NOT_FOUND"):
            ask("nope")
    assert not client.is_model_ready("nope")


def test_a_message_above_the_limit_is_rejected(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED"):
        client.infer("any", [tensor("X", np.zeros(3 * MIB, np.float32), "FP32")])
    assert client.is_server_live()


def test_a_disconnected_client_s_request_is_cancelled(gateway: RunningGateway, channel: Any) -> None:
    gateway.controller.on_request = lambda request: None
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    request = service_pb2.ModelInferRequest(model_name="ident", raw_input_contents=[X.tobytes()])
    request.inputs.add(name="X", datatype="FP32", shape=[1, 2])
    call = stub.ModelInfer.future(request)
    gateway.until(lambda: gateway.controller.requests)
    call.cancel()
    gateway.until(lambda: gateway.controller.cancels)
    (sent,) = gateway.controller.requests
    assert [cancel.request_id for cancel in gateway.controller.cancels] == [sent.request_id]
    gateway.do(lambda: gateway.controller.send(gateway.controller.answer(sent, outcome=Outcome.CANCELLED)))


def test_a_deadline_that_passes_cancels_too(gateway: RunningGateway, client: Any) -> None:
    gateway.controller.on_request = lambda request: None
    timeout_s = 1.0
    while not gateway.do(
        lambda: gateway.controller.requests
    ):  # on a busy machine none gets there in a second
        with pytest.raises(InferenceServerException, match=r"(?i)deadline"):
            client.infer("ident", [tensor("X", X, "FP32")], client_timeout=timeout_s)
        timeout_s *= 2
    controller = gateway.controller
    answers = [controller.answer(sent, outcome=Outcome.CANCELLED) for sent in controller.requests]
    gateway.do(lambda: controller.send(*answers))


def test_many_clients_at_once(gateway: RunningGateway, client: Any) -> None:
    found: dict[int, Any] = {}
    left = threading.Semaphore(0)

    def answered(n: int, result: Any, error: Any) -> None:
        found[n] = error or result.as_numpy("Y")
        left.release()

    for n in range(100):
        client.async_infer(
            "ident",
            [tensor("X", X + n, "FP32")],
            callback=lambda result, error, n=n: answered(n, result, error),
        )
    for _ in range(100):
        assert left.acquire(timeout=60)
    for n in range(100):
        np.testing.assert_array_equal(found[n], X + n)


def test_model_control(gateway: RunningGateway, client: Any, channel: Any) -> None:
    client.load_model("ident")
    client.unload_model("ident")
    # A published variant of the protocol has the name in field 1.
    stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
    stub.RepositoryModelLoad(service_pb2.RepositoryModelLoadRequest(repository_name="other"))
    assert [(asked.what, asked.body) for asked in gateway.controller.asks] == [
        (Question.LOAD, b'{"model":"ident"}'),
        (Question.UNLOAD, b'{"model":"ident"}'),
        (Question.LOAD, b'{"model":"other"}'),
    ]
    with pytest.raises(InferenceServerException, match=r"INVALID_ARGUMENT.*from the repository only"):
        client.load_model("ident", config="{}")
    on_ask = gateway.controller.on_ask
    gateway.controller.on_ask = lambda asked: Reply(
        ask_id=asked.ask_id, ok=False, code=500, body=b'{"error":"disk"}'
    )
    try:
        with pytest.raises(InferenceServerException, match=r"INTERNAL.*disk"):
            client.load_model("nope")
    finally:
        gateway.controller.on_ask = on_ask


def test_what_is_not_supported_says_so(client: Any) -> None:
    for asked, words in (
        (client.get_system_shared_memory_status, "start the server with --shared-memory PREFIX"),
        (
            lambda: client.register_cuda_shared_memory("c", b"aGFuZGxl", 0, 8),
            "CUDA shared memory is not supported",
        ),
    ):
        with pytest.raises(InferenceServerException, match=f"UNIMPLEMENTED.*{words}"):
            asked()


def test_health(gateway: RunningGateway, channel: Any) -> None:
    def asked(name: str) -> Any:
        rpc = HEALTH[name]
        make = channel.unary_stream if rpc.server_streaming else channel.unary_unary
        return make(
            f"/{HEALTH_SERVICE}/{name}",
            request_serializer=rpc.request.SerializeToString,
            response_deserializer=rpc.response.FromString,
        )

    request = HEALTH["Check"].request
    assert asked("Check")(request()).status == 1
    assert asked("Check")(request(service="inference.GRPCInferenceService")).status == 1
    with pytest.raises(grpc.RpcError) as caught:
        asked("Check")(request(service="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    told = asked("Watch")(request())
    assert next(told).status == 1
    gateway.do(lambda: gateway.controller.send(Readiness(ready=False, why="no worker")))
    assert next(told).status == 2
    assert asked("Check")(request()).status == 2
    gateway.do(lambda: gateway.controller.send(Readiness(ready=True)))
    assert next(told).status == 1
    told.cancel()
    strange = asked("Watch")(request(service="other"))
    assert next(strange).status == 3
    strange.cancel()


@pytest.mark.parametrize(
    ("message", "code", "words"),
    [
        # Millions of strings where the model takes two.
        (
            b"\x42\0" * (7 * MIB // 2),
            grpc.StatusCode.INVALID_ARGUMENT,
            "expected 2 elements in contents.bytes",
        ),
        (b"\x42\0" * (9 * MIB // 2), grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
    ],
)
def test_millions_of_strings_are_rejected_unread(
    channel: Any, message: bytes, code: grpc.StatusCode, words: str
) -> None:
    request = service_pb2.ModelInferRequest(model_name="text")
    request.inputs.add(name="X", datatype="BYTES", shape=[1, 2])
    head = request.inputs[0].SerializeToString()
    tensor_ = head + b"\x2a" + varint(len(message)) + message
    sent = b"\x0a\x04text\x2a" + varint(len(tensor_)) + tensor_
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(sent, timeout=60)
    assert refused.value.code() is code
    assert words in refused.value.details()


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def test_messages_other_than_inference_are_limited(channel: Any) -> None:
    call = channel.unary_unary("/inference.GRPCInferenceService/RepositoryModelLoad")
    with pytest.raises(grpc.RpcError, match="at most 16384 bytes, found 20000"):
        call(b"\x1a\0" * 10_000, timeout=60)


def test_large_tensors_arrive_whole(client: Any) -> None:
    x = np.random.default_rng(1).standard_normal(MIB // 2, np.float32)
    found = client.infer("any", [tensor("X", x, "FP32")])
    np.testing.assert_array_equal(found.as_numpy("Y"), x)
