"""What a client can get wrong: a clear message, the right status, and no harm to anybody else."""

from __future__ import annotations

import json
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from harness.http_load import infer_message
from harness.serving import Serving, total
from tests.end_to_end.conftest import WIDE, call, x_json

GOOD = [1.0, 2.0, 3.0, 4.0]


def request(**changes: Any) -> bytes:
    """A request for ``moody`` with parts of its one input changed; None leaves a part out."""
    tensor = {"name": "x", "shape": [1, 4], "datatype": "FP32", "data": GOOD} | changes
    return json.dumps(
        {"inputs": [{name: part for name, part in tensor.items() if part is not None}]}
    ).encode()


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v2/models/nosuch/infer", request(), 404, ["nosuch"]),
        ("/v2/models/moody/versions/9/infer", request(), 404, ["moody", "9"]),
        ("/v2/models/moody/infer", request(datatype="INT32", data=[1, 2, 3, 4]), 400, ["x", "INT32", "FP32"]),
        ("/v2/models/moody/infer", request(datatype="FP99"), 400, ["FP99"]),
        ("/v2/models/moody/infer", request(shape=[1, 5], data=[*GOOD, 5.0]), 400, ["x", "5", "4"]),
        ("/v2/models/moody/infer", request(shape=[4]), 400, ["x", "4"]),
        ("/v2/models/moody/infer", request(shape=[1, -4]), 400, ["x", "-4"]),
        ("/v2/models/moody/infer", request(data=GOOD[:3]), 400, ["x", "3", "4"]),
        ("/v2/models/moody/infer", request(data=["one", 2, 3, 4]), 400, ["x"]),
        ("/v2/models/moody/infer", request(name="z"), 400, ["z"]),
        ("/v2/models/moody/infer", request(data=None), 400, ["x"]),
        ("/v2/models/moody/infer", b'{"inputs": []}', 400, ["x"]),
        ("/v2/models/moody/infer", b"{}", 400, ["inputs"]),
        ("/v2/models/moody/infer", b"this is no JSON", 400, ["JSON"]),
        ("/v2/models/moody/infer", b"", 400, []),
        ("/v2/models/moody/infer", b"[1, 2]", 400, []),
        ("/v2/models/mlp/infer", request(), 400, ["x"]),
        ("/v2/models/moody/infer", x_json(GOOD, parameters={"slo_ms": -5}), 400, ["slo_ms", "-5"]),
        ("/v2/models/moody/infer", x_json(GOOD, parameters={"slo_ms": 1e15}), 400, ["slo_ms"]),
        ("/v2/models/moody/infer", x_json(GOOD, parameters={"slo_ms": "soon"}), 400, ["slo_ms", "soon"]),
        ("/v2/models/moody/infer", x_json(GOOD, parameters={"timeout": -1}), 400, ["timeout"]),
        ("/v2/models/moody/infer", x_json(GOOD * 2, [2, 4]), 400, ["1"]),
        ("/v2/models/moody/infer", x_json(GOOD, outputs=[{"name": "nope"}]), 400, ["nope"]),
    ],
    ids=lambda value: None,
)  # fmt: skip
def test_a_wrong_request_is_told_what_is_wrong(
    server: Serving, path: str, body: bytes, status: int, words: list[str]
) -> None:
    response = call(server.http_url, path, body)
    assert response.status == status, response.json
    message = response.json["error"]
    assert [word for word in words if word not in message] == [], message
    assert "Traceback" not in message


@pytest.mark.parametrize("header", ["soon", "-1", "0", "nan", "1e300"])
def test_a_wrong_slo_header_is_told(server: Serving, header: str) -> None:
    response = call(server.http_url, "/v2/models/moody/infer", request(), {"x-slo-ms": header})
    assert response.status == 400
    assert "x-slo-ms" in response.json["error"]


def binary(change: str) -> tuple[bytes, dict[str, str]]:
    """A binary request that is wrong in one way: (body, headers)."""
    message = infer_message("http://h:1", "m0", [("x", "FP32", (1, WIDE), bytes(4 * WIDE))])
    head, _, body = message.partition(b"\r\n\r\n")
    length = next(line.split(b":")[1] for line in head.split(b"\r\n") if line.startswith(b"Inference-Header"))
    headers = {"Inference-Header-Content-Length": length.decode().strip()}
    if change == "truncated":
        return body[:-10], headers
    if change == "too long":
        return body + b"more", headers
    return body, headers | {"Inference-Header-Content-Length": "999999" if change == "range" else "many"}


@pytest.mark.parametrize("change", ["truncated", "too long", "range", "text"])
def test_a_wrong_binary_body_is_told(server: Serving, change: str) -> None:
    body, headers = binary(change)
    response = call(server.http_url, "/v2/models/m0/infer", body, headers)
    assert response.status == 400, response.json
    assert response.json["error"]


def test_an_unknown_path_or_method(server: Serving) -> None:
    assert call(server.http_url, "/v3/nothing").status == 404
    assert call(server.http_url, "/v2/models/moody/infer").status == 405


def test_a_body_over_the_limit_is_refused_without_being_read(server: Serving) -> None:
    import http.client

    host, port = server.http_url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=60)
    connection.putrequest("POST", "/v2/models/moody/infer")
    connection.putheader("Content-Length", str(1 << 40))
    connection.endheaders(b"{}")
    response = connection.getresponse()
    assert response.status == 413
    assert b"error" in response.read()
    connection.close()


@pytest.mark.parametrize(
    ("model", "name", "shape", "kind", "code"),
    [
        ("nosuch", "x", [1, 4], "FP32", grpc.StatusCode.NOT_FOUND),
        ("moody", "z", [1, 4], "FP32", grpc.StatusCode.INVALID_ARGUMENT),
        ("moody", "x", [1, 5], "FP32", grpc.StatusCode.INVALID_ARGUMENT),
        ("moody", "x", [1, 4], "FP64", grpc.StatusCode.INVALID_ARGUMENT),
        ("moody", "x", [2, 4], "FP32", grpc.StatusCode.INVALID_ARGUMENT),
    ],
)
def test_a_wrong_grpc_request_has_the_right_code(
    server: Serving, model: str, name: str, shape: list[int], kind: str, code: grpc.StatusCode
) -> None:
    tensor = tritonclient.grpc.InferInput(name, shape, kind)
    tensor.set_data_from_numpy(np.zeros(shape, np.float64 if kind == "FP64" else np.float32))
    client = tritonclient.grpc.InferenceServerClient(server.grpc_url)
    with client, pytest.raises(InferenceServerException) as caught:
        client.infer(model, [tensor])
    assert caught.value.status() == str(code)


def test_a_model_that_raises_fails_its_request_alone(server: Serving) -> None:
    response = call(server.http_url, "/v2/models/moody/infer", x_json([13.0, 0.0, 0.0, 0.0]))
    assert response.status == 500
    assert "thirteen is not served" in response.json["error"]
    assert call(server.http_url, "/v2/models/moody/infer", x_json(GOOD)).status == 200


def test_broken_models_are_told_and_harm_no_other(server: Serving) -> None:
    for model in ("corrupt", "badconfig"):
        assert call(server.http_url, f"/v2/models/{model}/infer", x_json(GOOD)).status in (400, 404, 503)
    assert call(server.http_url, "/v2/models/moody/infer", x_json(GOOD)).status == 200


def test_after_all_that_the_counts_add_up(server: Serving) -> None:
    call(server.http_url, "/v2/models/moody/infer", request(name="z"))
    metrics = server.metrics()
    received = total(metrics, "clockwork_requests_received_total")
    assert received == total(metrics, "clockwork_requests_total") + total(metrics, "clockwork_requests_open")
    assert total(metrics, "clockwork_gateway_requests_total", outcome="invalid") >= 1
    assert total(metrics, "clockwork_answers_unmatched_total") == 0
