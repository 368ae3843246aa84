"""HTTP with stock clients: every endpoint, every status, every kind of invalid request."""

from __future__ import annotations

import ctypes
import json
import mmap
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from tritonclient.utils import InferenceServerException

from clockwork_client.datatypes import Buffer
from clockwork_serve.messages import Answer, Outcome, Quarantined, Question, Readiness, Reason, Reply, Request
from clockwork_serve.serve.gateway.requests import COPIED_AT_ONCE
from clockwork_serve.serve.http import server
from clockwork_serve.serve.http.exchange import HttpExchange, Outbox
from clockwork_serve.serve.http.responses import HttpResponse
from clockwork_serve.units import ms
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import BOMB, IDENT_JSON, INFER, X, ask, get, post, tensor

# The stock client's destructor stumbles when the collector happens to run it in another thread.
pytestmark = pytest.mark.filterwarnings("ignore:.*InferenceServerClient.__del__")

# Stock clients


def test_a_stock_client_finds_everything(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("ident")
    assert client.is_model_ready("ident", "1")
    assert not client.is_model_ready("nope")
    metadata = client.get_server_metadata()
    assert metadata["name"] == "clockwork-serve"
    assert "statistics" in metadata["extensions"]
    assert client.get_model_metadata("ident") == {
        "name": "ident", "versions": ["1"], "platform": "onnxruntime_onnx",
        "inputs": [{"name": "X", "datatype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "Y", "datatype": "FP32", "shape": [-1, 2]}],
    }  # fmt: skip
    assert client.get_model_config("ident", "1")["max_batch_size"] == 8
    assert client.get_model_repository_index() == [{"name": "ident", "version": "1", "state": "READY"}]
    assert client.get_trace_settings() == {"trace_level": ["OFF"]}
    assert client.get_log_settings()["log_file"] == ""


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_a_stock_client_gets_its_answer(client: Any, *, binary_in: bool, binary_out: bool) -> None:
    wish = tritonclient.http.InferRequestedOutput("Y", binary_data=binary_out)
    found = client.infer("ident", [tensor("X", X, "FP32", binary=binary_in)], outputs=[wish], request_id="42")
    np.testing.assert_array_equal(found.as_numpy("Y"), X)
    response = found.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("42", "ident", "1")
    assert response["parameters"] == {
        "queue_ms": 1.0, "exec_ms": 2.0, "expected_ms": 2.5, "batch_size": 1, "cold_start": False,
    }  # fmt: skip


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_a_stock_client_may_compress(client: Any, algorithm: str) -> None:
    found = client.infer("ident", [tensor("X", X, "FP32")], request_compression_algorithm=algorithm)
    np.testing.assert_array_equal(found.as_numpy("Y"), X)
    large = np.zeros(200_000, np.float32)
    found = client.infer("any", [tensor("X", large, "FP32")], request_compression_algorithm=algorithm)
    np.testing.assert_array_equal(found.as_numpy("Y"), large)
    noise = np.random.default_rng(1).random(100_000).astype(np.float32)
    found = client.infer("any", [tensor("X", noise, "FP32")], request_compression_algorithm=algorithm)
    np.testing.assert_array_equal(found.as_numpy("Y"), noise)


@pytest.mark.parametrize("count", [1, 15_000, 16_400, 70_000, 1_000_000])
def test_tensors_of_any_size_are_echoed(client: Any, count: int) -> None:
    data = np.random.default_rng(count).random(count).astype(np.float32)
    for _ in range(3):
        found = client.infer("any", [tensor("X", data, "FP32")])
        np.testing.assert_array_equal(found.as_numpy("Y"), data)


def test_large_answers_are_copied_a_piece_in_a_turn_or_not_at_all(
    gateway: RunningGateway, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[Buffer] = []
    write = Outbox.write

    def recorded(outbox: Outbox, exchange: HttpExchange, response: HttpResponse) -> None:
        parts.extend(response.parts)
        write(outbox, exchange, response)

    monkeypatch.setattr(Outbox, "write", recorded)
    data = np.random.default_rng(1).random(2_000_000).astype(np.float32)
    for spilled in (True, False):
        taken = gateway.controller.spill.used_bytes
        found = client.infer("any", [tensor("X", data, "FP32")])
        np.testing.assert_array_equal(found.as_numpy("Y"), data)
        assert (gateway.controller.spill.used_bytes > taken) == spilled
        gateway.controller.spill.free_unused()
    wish = tritonclient.http.InferRequestedOutput("Y", binary_data=False)
    found = client.infer("any", [tensor("X", data[:200_000], "FP32")], outputs=[wish])
    np.testing.assert_array_equal(found.as_numpy("Y"), data[:200_000])
    # A copy made at once would be bytes.
    assert {type(part) for part in parts if len(part) > COPIED_AT_ONCE} == {memoryview}
    gateway.until(lambda: not gateway.servers.gateway.slots.used_bytes)


def test_a_client_that_leaves_while_its_answer_is_copied_holds_nothing(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, begun = gateway.servers.http._copies, list[Any]()
    begin = copies.begin
    monkeypatch.setattr(copies, "begin", lambda *what: begun.append(what))
    described = {
        "name": "X",
        "datatype": "FP32",
        "shape": [200_000],
        "parameters": {"binary_data_size": 800_000},
    }
    body = json.dumps({"inputs": [described], "parameters": {"binary_data_output": True}}).encode()
    head = f"Inference-Header-Content-Length: {len(body)}"
    with gateway.connect() as client:
        client.sendall(post("/v2/models/any/infer", body + bytes(800_000), head))
        gateway.until(lambda: begun)
        assert gateway.servers.gateway.slots.used_bytes
    gateway.until(lambda: not gateway.servers.gateway.connections)
    gateway.do(lambda: begin(*begun[0]))
    gateway.until(lambda: not gateway.servers.gateway.slots.used_bytes)
    last = gateway.controller.requests[-1].request_id
    gateway.until(lambda: last in gateway.controller.in_time)
    assert gateway.controller.in_time.count(last) == 1


def resident_bytes(memory: mmap.mmap) -> int:
    """How much of it takes memory. That of the whole process changes for other reasons, too."""
    array = np.frombuffer(memory, np.uint8)
    pages = np.zeros(-(-len(memory) // mmap.PAGESIZE), np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    assert not libc.mincore(
        ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(len(memory)), ctypes.c_void_p(pages.ctypes.data)
    )
    return int((pages & 1).sum()) * mmap.PAGESIZE


@pytest.mark.parametrize("in_thread", [False, True])
def test_a_large_body_s_memory_is_given_back_a_piece_in_a_turn(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, *, in_thread: bool
) -> None:
    http, pieces, made = gateway.servers.http, list[tuple[int, int]](), list[mmap.mmap]()

    class Recorded(mmap.mmap):
        def __init__(self, *_: Any, **__: Any) -> None:
            made.append(self)

        def madvise(self, option: int, start: int = 0, length: int = 0) -> None:
            super().madvise(option, start, length or len(self))
            if option == mmap.MADV_DONTNEED:
                pieces.append((start, length))

    monkeypatch.setattr(server.mmap, "mmap", Recorded)
    size = 5 * server.GIVEN_BACK_BYTES + 1
    rooms = [gateway.do(lambda: http.room(size))[1:]]
    rooms[0][:] = bytes(len(rooms[0]))
    (memory,) = made
    assert resident_bytes(memory) >= size
    if in_thread:
        rooms.clear()
    else:
        gateway.do(rooms.clear)
    gateway.until(lambda: len(pieces) == 6)
    assert [start for start, _ in pieces] == [*range(0, size, server.GIVEN_BACK_BYTES)]
    assert max(length for _, length in pieces) == server.GIVEN_BACK_BYTES
    assert resident_bytes(memory) == 0
    assert len(http.room(server.GIVEN_BACK_BYTES)) == server.GIVEN_BACK_BYTES


def test_strings_and_halves(client: Any) -> None:
    words = np.array([[b"a", "größer".encode()]], object)
    found = client.infer("text", [tensor("X", words, "BYTES")])
    assert found.as_numpy("Y").tolist() == words.tolist()
    wish = tritonclient.http.InferRequestedOutput("Y", binary_data=False)
    found = client.infer("text", [tensor("X", words, "BYTES", binary=False)], outputs=[wish])
    assert found.get_response()["outputs"][0]["data"] == ["a", "größer"]
    half = np.array([[1.5, 2]], np.float16)
    found = client.infer("half", [tensor("X", half, "FP16")])
    np.testing.assert_array_equal(found.as_numpy("Y"), half)


def test_many_inputs_some_outputs_mixed_forms(client: Any) -> None:
    a, b = (np.arange(16, dtype=np.int32).reshape(1, 16) + n for n in (0, 100))
    found = client.infer(
        "pair",
        [tensor("A", a, "INT32", binary=False), tensor("B", b, "INT32")],
        outputs=[tritonclient.http.InferRequestedOutput("D")],
    )
    np.testing.assert_array_equal(found.as_numpy("D"), b)
    assert found.as_numpy("C") is None
    classes = tritonclient.http.InferRequestedOutput("C", class_count=2)
    found = client.infer("pair", [tensor("A", a, "INT32"), tensor("B", b, "INT32")], outputs=[classes])
    assert found.as_numpy("C").tolist() == [[b"15:15", b"14:14"]]


def test_many_clients_at_once(gateway: RunningGateway) -> None:
    client = tritonclient.http.InferenceServerClient(gateway.http_url, concurrency=16)
    sent = [np.full((1, 2), n, np.float32) for n in range(200)]
    waiting = [client.async_infer("ident", [tensor("X", data, "FP32")]) for data in sent]
    for data, found in zip(sent, waiting, strict=True):
        np.testing.assert_array_equal(found.get_result().as_numpy("Y"), data)
    client.close()


def test_slos_of_a_stock_client(gateway: RunningGateway, client: Any) -> None:
    client.infer("ident", [tensor("X", X, "FP32")], timeout=30_000_000)
    client.infer("ident", [tensor("X", X, "FP32")], parameters={"slo_ms": 20_000})
    client.infer("ident", [tensor("X", X, "FP32")], headers={"X-SLO-MS": "12000.5"})
    client.infer("ident", [tensor("X", X, "FP32")], priority=3)
    requests = gateway.controller.requests
    assert [request.deadline_ns - request.arrival_ns for request in requests] == [
        ms(30_000), ms(20_000), ms(12_000.5), ms(60_000),
    ]  # fmt: skip
    assert requests[3].priority == 3


def test_statistics_count_what_never_reached_the_controller(gateway: RunningGateway, client: Any) -> None:
    before = client.get_inference_statistics("ident")["model_stats"][0]["inference_stats"]["fail"]["count"]
    with pytest.raises(InferenceServerException):
        client.infer("ident", [tensor("X", X.astype(np.int32), "INT32")])
    after = client.get_inference_statistics("ident", "1")["model_stats"][0]["inference_stats"]["fail"][
        "count"
    ]
    assert after == before + 1
    assert [json.loads(asked.body) for asked in gateway.controller.asks] == [
        {"model": "ident"}, {"model": "ident/1"},
    ]  # fmt: skip


def test_model_control(gateway: RunningGateway, client: Any) -> None:
    client.load_model("ident")
    client.unload_model("ident")
    assert [(asked.what, json.loads(asked.body)) for asked in gateway.controller.asks] == [
        (Question.LOAD, {"model": "ident"}), (Question.UNLOAD, {"model": "ident"}),
    ]  # fmt: skip
    with pytest.raises(InferenceServerException, match="from the repository only"):
        client.load_model("ident", config="{}")
    on_ask = gateway.controller.on_ask
    gateway.controller.on_ask = lambda asked: Reply(
        ask_id=asked.ask_id, ok=False, code=404, body=b'{"error":"no such folder"}'
    )
    try:
        with pytest.raises(InferenceServerException, match=r"\[404\] no such folder"):
            client.load_model("nope")
    finally:
        gateway.controller.on_ask = on_ask


def test_it_describes_itself(gateway: RunningGateway) -> None:
    found = ask(gateway, get("/v2/openapi.json"))
    assert (found.status, found.headers["content-type"]) == (200, "application/json")
    assert found.json["info"]["version"] == version("clockwork-serve")
    assert "/v2/models/{model}/infer" in found.json["paths"]
    bare = ask(gateway, get("/v2/openapi.json", method="HEAD"))
    assert (bare.headers["content-length"], bare.body) == (str(len(found.body)), b"")


def test_model_control_may_be_off(tmp_path: Path) -> None:
    with running_gateway(tmp_path, model_control=False) as found:
        response = ask(found, post("/v2/repository/models/ident/load"))
        assert response.status == 503
        assert "not allowed" in response.json["error"]


# Ends


@pytest.mark.parametrize(
    ("outcome", "reason", "status"),
    [
        (Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE, 429),
        (Outcome.REJECTED, Reason.DRAINING, 503),
        (Outcome.EXPIRED, Reason.LATE, 504),
        (Outcome.FAILED, Reason.MODEL_RAISED, 500),
    ],
)
def test_each_outcome_has_its_status_and_reason(
    gateway: RunningGateway, outcome: Outcome, reason: Reason, status: int
) -> None:
    def answered(request: Request) -> Answer:
        return gateway.controller.answer(
            request, outcome=outcome, reason=reason, message="this is why", retry_after_ns=ms(1500.25)
        )

    gateway.controller.on_request = answered
    found = ask(gateway, post("/v2/models/ident/infer", b'{"id":"7",' + IDENT_JSON[1:]))
    assert found.status == status
    assert found.json == {
        "error": f"{reason}: this is why", "outcome": outcome, "reason": reason, "id": "7",
        "retry_after_ms": 1500.25,
    }  # fmt: skip
    assert found.headers["retry-after"] in {"2", "3"}
    assert found.headers["clockwork-request-id"] == gateway.controller.requests[0].request_id


def test_retry_advice_is_randomised(gateway: RunningGateway) -> None:
    def answered(request: Request) -> Answer:
        return gateway.controller.answer(
            request, outcome=Outcome.REJECTED, reason=Reason.QUEUE_FULL, retry_after_ns=ms(7)
        )

    gateway.controller.on_request = answered
    gateway.servers.gateway.rng.seed(3)
    told = [ask(gateway, post(INFER, IDENT_JSON)) for _ in range(24)]
    assert {found.headers["retry-after"] for found in told} == {"1", "2"}
    assert {found.json["retry_after_ms"] for found in told} == {7.0}, "exact, whatever the header says"


def test_a_disconnected_client_s_request_is_cancelled(gateway: RunningGateway) -> None:
    gateway.controller.on_request = lambda request: None
    client = gateway.connect()
    client.sendall(post("/v2/models/ident/infer", IDENT_JSON) * 1)
    gateway.until(lambda: gateway.controller.requests)
    client.close()
    gateway.until(lambda: gateway.controller.cancels)
    (request,) = gateway.controller.requests
    assert [cancel.request_id for cancel in gateway.controller.cancels] == [request.request_id]
    gateway.do(lambda: gateway.controller.send(gateway.controller.answer(request, outcome=Outcome.CANCELLED)))


def test_a_client_that_disconnects_while_sending_leaves_nothing(gateway: RunningGateway) -> None:
    client = gateway.connect()
    head = post("/v2/models/any/infer", bytes(2_000_000), "Inference-Header-Content-Length: 100")
    client.sendall(head[:1_000_000])
    gateway.until(lambda: gateway.servers.gateway.slots.used_bytes > 0)
    client.close()
    gateway.until(lambda: gateway.servers.gateway.slots.used_bytes == 0)


def test_not_ready_is_503(tmp_path: Path) -> None:
    with running_gateway(tmp_path) as found:
        found.do(lambda: found.controller.send(Readiness(ready=False, why="no worker")))
        found.until(lambda: not found.servers.gateway.link.ready)
        response = ask(found, get("/v2/health/ready"))
        assert (response.status, response.json) == (503, {"error": "not ready: no worker"})
        assert ask(found, get("/v2/models/ident/ready")).status == 503
        assert ask(found, get("/v2/health/live")).status == 200
        # What is in the catalogue is the controller's to refuse.
        assert ask(found, post("/v2/models/ident/infer", IDENT_JSON)).status == 200
        found.do(found.controller.stop)
        found.until(lambda: not found.servers.gateway.link.is_open)
        response = ask(found, post("/v2/models/ident/infer", IDENT_JSON))
        assert (response.status, response.json["reason"]) == (503, "not_serving")
        assert ask(found, get("/metrics")).status == 503


# Wrong requests


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "words"),
    [
        ("/v2/models/nope/infer", IDENT_JSON, (), 404, "unknown model: 'nope' is not found"),
        ("/v2/models/ident/versions/9/infer", IDENT_JSON, (), 404, "'ident' version 9 is not found"),
        ("/v2/models/ident/versions/abc/infer", IDENT_JSON, (), 404, "no such path: '/v2/models/ident/ver"),
        (INFER, b'{"inputs":[', (), 400, "failed to parse the request JSON buffer"),
        (INFER, b"", (), 400, "failed to parse the request JSON buffer"),
        (INFER, b"[" * 60_000, (), 400, "JSON"),
        (INFER, b"[" * 100_000, (), 413, "JSON"),
        (INFER, IDENT_JSON.replace(b"FP32", b"INT32"), (), 400, "not INT32"),
        (INFER, IDENT_JSON.replace(b'"X"', b'"Z"'), (), 400, "unexpected inference input 'Z'"),
        (INFER, IDENT_JSON.replace(b"[1,2]", b"[1,3]"), (), 400, "expected 3 elements"),
        (INFER, b'{"inputs":[]}', (), 400, "missing required input(s) ['X']"),
        (INFER, IDENT_JSON, ("x-slo-ms: -1",), 400, "header 'x-slo-ms': expected a number"),
        (INFER, IDENT_JSON, ("Inference-Header-Content-Length: x",), 400, "found 'x'"),
        (INFER, b"{}", ("Inference-Header-Content-Length: 9999",), 400, "range (0, 2), got: 9999"),
        (INFER, IDENT_JSON, ("Content-Encoding: br",), 501, "gzip or deflate, found 'br'"),
        (INFER, IDENT_JSON, ("Content-Encoding: gzip",), 400, "expected a gzip body"),
        (INFER, BOMB, ("Content-Encoding: gzip",), 413, "once decompressed"),
        ("/v2/repository/index", b"[1]", (), 400, "expected a JSON object"),
        ("/v2/repository/index", b'{"ready":1}', (), 400, "ready: expected true or false, found 1"),
        ("/v2/repository/models/x/load", b'{"parameters":[]}', (), 400, "expected an object"),
        ("/v2/systemsharedmemory/region/r/register", b"{}", (), 501, "with --shared-memory PREFIX"),
        ("/v2/cudasharedmemory/region/r/register", b"{}", (), 501, "CUDA shared memory is not supported"),
        ("/v2/models/ident/generate", b"{}", (), 501, "generate"),
        ("/v2/nope?x", b"", (), 404, "no such path: '/v2/nope'; the protocol is under /v2, "),
        ("/%0a" + "x" * 3000, b"", (), 404, "xxx...'; the protocol"),
        ("/v2/logging", b"{", (), 400, "expected a JSON object"),
        ("/v2/health/live", b"{}", (), 405, "Method Not Allowed"),
    ],
)  # fmt: skip
def test_invalid_requests_get_an_explanation(
    gateway: RunningGateway, path: str, body: bytes, headers: tuple[str, ...], status: int, words: str
) -> None:
    found = ask(gateway, post(path, body, *headers))
    assert found.status == status, found.body
    assert words in found.json["error"]
    assert found.headers["content-type"] == "application/json"
    assert gateway.controller.requests == []
    assert ask(gateway, post("/v2/models/ident/infer", IDENT_JSON)).status == 200


def test_what_is_asked_at_the_metrics_port_by_mistake_is_shown_to_the_right_one(
    gateway: RunningGateway,
) -> None:
    address = "127.0.0.1", gateway.servers.port_by_name["metrics_port"]
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(post(INFER, IDENT_JSON))
        found = b"".join(iter(lambda: client.recv(65536), b""))
    assert found.startswith(b"HTTP/1.1 404 ")
    assert b"no such path: '/v2/models/ident/infer'; this port has /metrics" in found
    assert b"the protocol is on the HTTP port" in found


def test_a_header_twice_is_refused_before_it_is_a_request(gateway: RunningGateway) -> None:
    found = ask(gateway, post(INFER, IDENT_JSON, "x-slo-ms: 50", "x-slo-ms: 60"))
    message = "header x-slo-ms: expected it once, found it more often"
    assert (found.status, found.json) == (400, {"error": message})


def test_methods_matter(gateway: RunningGateway) -> None:
    found = ask(gateway, get("/v2/models/ident/infer"))
    assert (found.status, found.headers["allow"]) == (405, "POST")
    found = ask(gateway, get("/v2", method="HEAD"))
    assert (found.status, found.body) == (200, b"")
    assert int(found.headers["content-length"]) > 10
    assert ask(gateway, get("/v2/systemsharedmemory/status")).status == 501


def test_a_raw_body_needs_no_json(gateway: RunningGateway) -> None:
    # Spaces around what a header says are none of it.
    found = ask(gateway, post("/v2/models/ident/infer", X.tobytes(), "Inference-Header-Content-Length:  0 "))
    assert found.status == 200
    assert found.body[int(found.headers["inference-header-content-length"]) :] == X.tobytes()
    large = np.arange(100_000, dtype=np.float32).tobytes()
    found = ask(gateway, post("/v2/models/any/infer", large, "Inference-Header-Content-Length: 0"))
    assert found.body[int(found.headers["inference-header-content-length"]) :] == large


def test_names_may_need_quoting(gateway: RunningGateway) -> None:
    found = ask(gateway, get("/v2/models/a%2Fb%20c?x=1"))
    assert found.json == {"error": "Request for unknown model: 'a/b c' is not found"}
    assert ask(gateway, get("/v2/models/%69dent/")).status == 200


def test_a_model_in_quarantine_is_not_ready_and_says_why(gateway: RunningGateway, client: Any) -> None:
    told = Quarantined(model="half/1", why="in quarantine: it took a device down", since_ns=1)
    gateway.do(lambda: gateway.controller.send(told))
    found = ask(gateway, get("/v2/models/half/ready"))
    assert (found.status, client.is_model_ready("half"), client.is_model_ready("ident")) == (503, False, True)
    assert "model half/1 is not ready" in str(found.body)
    assert "it took a device down" in str(found.body)
    gateway.do(lambda: gateway.controller.send(Quarantined(model="half/1")))
    assert client.is_model_ready("half")
