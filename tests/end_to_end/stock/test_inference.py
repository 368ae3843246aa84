"""Inference through every stock client: all datatypes, all options, every answer right or a clear refusal."""

from __future__ import annotations

import json
import queue
from collections.abc import AsyncIterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tritonclient.utils import triton_to_np_dtype

from harness.serving import Serving
from tests.end_to_end.conftest import call
from tests.end_to_end.stock.conftest import KINDS, SLOW_S, Stock

# Older releases of tritonclient take float32 for BF16 and give it back; newer ones have the type itself.
BFLOAT16 = np.float32 if triton_to_np_dtype("BF16") is np.float32 else ml_dtypes.bfloat16
NUMBERS = {
    "BOOL": np.bool_, "UINT8": np.uint8, "UINT16": np.uint16, "UINT32": np.uint32, "UINT64": np.uint64,
    "INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FP16": np.float16,
    "BF16": BFLOAT16, "FP32": np.float32, "FP64": np.float64,
}  # fmt: skip
BINARY_ONLY = ("FP16", "BF16")
X = np.array([[1.5, -2.0, 3.0]], np.float32)
BITS = np.array([[0, 1], [1, 1]], np.float32)
RESOURCE = {"429", "504", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED"}
"""How a request ends whose deadline cannot be met: refused at once, or when it has passed."""


def sample(datatype: str) -> Any:
    """Two rows of three with the extremes; BF16 from numbers that it holds."""
    if datatype == "BYTES":
        return np.array([[b"a", b"", "größer".encode()], [b'"\\', b"b", b"c" * 300]], object)
    if datatype in ("FP16", "BF16", "FP32", "FP64"):
        return np.array([[0, -1.5, 2], [1024, -0.0, 0.25]], NUMBERS[datatype])
    if datatype == "BOOL":
        return np.array([[True, False, True], [False, False, True]])
    limits = np.iinfo(NUMBERS[datatype])
    return np.array([[0, 1, limits.min], [limits.max, 7, 8]], NUMBERS[datatype])


def x_of(stock: Stock, data: Any = X, datatype: str = "FP32", **more: Any) -> list[Any]:
    return [stock.tensor("x", data, datatype, **more)]


def either(stock: Stock, http: str, grpc: str) -> str:
    return grpc if stock.grpc else http


# Tensors


@pytest.mark.parametrize("datatype", KINDS)
def test_every_datatype_comes_back_as_it_went(stock: Stock, datatype: str) -> None:
    data = sample(datatype)
    found = stock("infer", f"echo_{datatype}", x_of(stock, data, datatype)).as_numpy("y")
    np.testing.assert_array_equal(found, data)


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
@pytest.mark.parametrize("datatype", [datatype for datatype in KINDS if datatype not in BINARY_ONLY])
@pytest.mark.parametrize("stock", ["http", "http.aio"], indirect=True)
def test_json_and_binary_tensors_mix(
    stock: Stock, datatype: str, *, binary_in: bool, binary_out: bool
) -> None:
    data = sample(datatype)
    wish = stock.wish("y", binary_data=binary_out)
    found = stock(
        "infer", f"echo_{datatype}", x_of(stock, data, datatype, binary_data=binary_in), outputs=[wish]
    )
    assert ("data" in found.get_output("y")) != binary_out
    answer = found.as_numpy("y")
    if datatype == "BYTES" and not binary_out:
        answer = np.vectorize(str.encode, otypes=[object])(answer)
    np.testing.assert_array_equal(answer.astype(data.dtype), data)


@pytest.mark.parametrize("datatype", BINARY_ONLY)
@pytest.mark.parametrize("stock", ["http", "http.aio"], indirect=True)
def test_half_floats_have_no_json(stock: Stock, datatype: str) -> None:
    wish = stock.wish("y", binary_data=False)
    status = stock.refusal(
        "infer", f"echo_{datatype}", x_of(stock, sample(datatype), datatype), outputs=[wish],
        words="has no JSON form",
    )  # fmt: skip
    assert status == "400"


def test_bytes_need_not_be_text(stock: Stock) -> None:
    data = np.array([[b"\x00\xff\xfe"], [b""]], object)
    found = stock("infer", "any_bytes", x_of(stock, data, "BYTES"))
    np.testing.assert_array_equal(found.as_numpy("y"), data)
    # A graph's strings are text.
    status = stock.refusal("infer", "echo_BYTES", x_of(stock, data[:1].repeat(3, 1), "BYTES"), words="UTF-8")
    assert status == either(stock, "400", "INVALID_ARGUMENT")


def test_outputs_that_were_asked_for_come_in_that_order(stock: Stock) -> None:
    a, b = np.full((1, 16), 7, np.int32), np.full((1, 16), 5, np.int32)
    inputs = [stock.tensor("INPUT1", b, "INT32"), stock.tensor("INPUT0", a, "INT32")]
    both = [stock.wish("OUTPUT1"), stock.wish("OUTPUT0")]
    found = stock("infer", "add_sub", inputs, outputs=both)
    assert (found.as_numpy("OUTPUT0")[0, 0], found.as_numpy("OUTPUT1")[0, 0]) == (12, 2)
    response = found.get_response()
    names = [each.name for each in response.outputs] if stock.grpc else [
        each["name"] for each in response["outputs"]
    ]  # fmt: skip
    assert names == ["OUTPUT1", "OUTPUT0"]
    one = stock("infer", "add_sub", inputs, outputs=both[:1])
    assert one.as_numpy("OUTPUT0") is None
    assert one.as_numpy("OUTPUT1")[0, 0] == 2


def test_classes_are_named(stock: Stock) -> None:
    inputs = [stock.tensor("bits", BITS, "FP32")]
    wish = stock.wish("probability", class_count=2)
    found = stock("infer", "mlp", inputs, outputs=[wish]).as_numpy("probability")
    classes = [[bytes(one).decode().split(":")[1:] for one in row] for row in found]
    assert classes == [[["1", "different"], ["0", "equal"]], [["0", "equal"], ["1", "different"]]]
    assert float(bytes(found[0][0]).split(b":")[0]) == pytest.approx(0.98, abs=0.01)


# Options


def test_ids_versions_and_durations_come_back(stock: Stock) -> None:
    found = stock("infer", "echo_FP32", x_of(stock), model_version="1", request_id="mine")
    response = found.get_response()
    if stock.grpc:
        parameters = response.parameters
        told = (response.id, response.model_name, response.model_version)
    else:
        parameters = response["parameters"]
        told = (response["id"], response["model_name"], response["model_version"])
    assert told == ("mine", "echo_FP32", "1")
    assert set(parameters) == {"queue_ms", "exec_ms", "expected_ms", "batch_size", "cold_start"}


@pytest.mark.parametrize("asked", ["gzip", "deflate"])
@pytest.mark.parametrize("rows", [1, 16])
def test_requests_may_be_compressed(stock: Stock, asked: str, rows: int) -> None:
    if stock.name == "http.aio" and not hasattr(stock.module, "gzip"):
        pytest.skip("this release of tritonclient.http.aio forgot to import gzip and zlib")
    data = np.repeat(X, rows, 0)
    name = either(stock, "request_compression_algorithm", "compression_algorithm")
    found = stock("infer", "echo_FP32", x_of(stock, data), **{name: asked})
    np.testing.assert_array_equal(found.as_numpy("y"), data)


WORDS = np.array([[b"word" * 100] * 3] * 16, object)


@pytest.mark.parametrize("wanted", ["gzip", "deflate"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("stock", ["http", "http.aio"], indirect=True)
def test_responses_may_be_compressed(stock: Stock, wanted: str, rows: int, *, binary: bool) -> None:
    inputs = x_of(stock, WORDS[:rows], "BYTES")
    more = {"outputs": [stock.wish("y", binary_data=binary)], "response_compression_algorithm": wanted}
    words = stock("infer", "echo_BYTES", inputs, **more).as_numpy("y")
    np.testing.assert_array_equal(words if binary else np.char.encode(words.astype(str)), WORDS[:rows])


@pytest.mark.parametrize(
    ("said", "rows", "coding"),
    [("gzip", 16, "gzip"), ("deflate", 16, "deflate"), ("gzip, deflate, br", 16, None), ("gzip", 1, None)],
)
def test_only_who_asks_gets_a_compressed_response(
    stock_server: Serving, said: str, rows: int, coding: str | None
) -> None:
    data = [["word" * (100 if rows > 1 else 1)] * 3] * rows
    tensor = {"name": "x", "shape": [rows, 3], "datatype": "BYTES", "data": data}
    body = json.dumps({"inputs": [tensor]}).encode()
    response = call(stock_server.http_url, "/v2/models/echo_BYTES/infer", body, {"Accept-Encoding": said})
    assert (response.status, response.headers.get("content-encoding")) == (200, coding)


def test_priorities_and_limits_are_taken(stock: Stock) -> None:
    more = {"priority": 1, "timeout": 5_000_000, "parameters": {"slo_ms": 5000}}
    found = stock("infer", "echo_FP32", x_of(stock), headers={"x-slo-ms": "5000"}, **more)
    np.testing.assert_array_equal(found.as_numpy("y"), X)
    bad = either(stock, "400", "INVALID_ARGUMENT")
    assert stock.refusal("infer", "echo_FP32", x_of(stock), timeout=-1, words="'timeout'") == bad
    slo = {"slo_ms": -1}
    assert stock.refusal("infer", "echo_FP32", x_of(stock), parameters=slo, words="'slo_ms'") == bad
    header = {"x-slo-ms": "soon"}
    assert stock.refusal("infer", "echo_FP32", x_of(stock), headers=header, words="'x-slo-ms'") == bad


@pytest.mark.parametrize(
    "limit", [{"timeout": 1000}, {"parameters": {"slo_ms": 1}}, {"headers": {"x-slo-ms": "1"}}]
)
def test_a_limit_that_cannot_be_met_is_an_early_no(stock: Stock, limit: dict[str, Any]) -> None:
    data = np.zeros((1, 4), np.float32)
    status = stock.refusal("infer", "slow", x_of(stock, data), **limit, words="deadline")
    assert status in RESOURCE


@pytest.mark.parametrize("stock", ["grpc", "grpc.aio"], indirect=True)
def test_a_client_that_stops_waiting_is_told_so_by_its_library(stock: Stock) -> None:
    data = np.zeros((1, 4), np.float32)
    more: dict[str, Any] = {"client_timeout": SLOW_S / 10, "words": r"(?i)deadline"}
    assert stock.refusal("infer", "slow", x_of(stock, data), **more) in RESOURCE


@pytest.mark.parametrize("stock", ["http", "http.aio"], indirect=True)
def test_a_query_is_no_part_of_the_path(stock: Stock) -> None:
    query = {"trace": ["a", "b/c"], "of": 1}
    found = stock("infer", "echo_FP32", x_of(stock), query_params=query)
    np.testing.assert_array_equal(found.as_numpy("y"), X)
    assert stock("get_server_metadata", query_params=query)["name"] == "clockwork-serve"


@pytest.mark.parametrize(
    "asked", [{"sequence_id": 7, "sequence_start": True}, {"sequence_id": "talk", "sequence_end": True}]
)
def test_sequences_are_refused(stock: Stock, asked: dict[str, Any]) -> None:
    status = stock.refusal(
        "infer", "echo_FP32", x_of(stock), **asked, words="keeps no state between requests"
    )
    assert status == either(stock, "501", "UNIMPLEMENTED")


@pytest.mark.parametrize(
    ("model", "version", "http", "grpc", "words"),
    [
        ("nosuch", "", "404", "NOT_FOUND", "unknown model: 'nosuch'"),
        ("echo_FP32", "9", "404", "NOT_FOUND", "'echo_FP32' version 9"),
        ("echo_INT32", "", "400", "INVALID_ARGUMENT", "data-type is 'FP32'.*expects 'INT32'"),
        ("spare", "", "400", "INVALID_ARGUMENT", "unexpected shape for input 'x'"),
    ],
)
def test_wrong_requests_are_told_what_is_wrong(
    stock: Stock, model: str, version: str, http: str, grpc: str, words: str
) -> None:
    status = stock.refusal("infer", model, x_of(stock), model_version=version, words=words)
    assert status == either(stock, http, grpc)


# Streams


@pytest.mark.parametrize("stock", ["grpc"], indirect=True)
def test_one_stream_carries_answers_errors_and_the_final_flag(stock: Stock) -> None:
    ends: queue.Queue[Any] = queue.Queue()
    stock("start_stream", callback=lambda result, error: ends.put((result, error)))
    for request_id in ("1", "2"):
        more = {"request_id": request_id, "enable_empty_final_response": request_id == "2"}
        stock("async_stream_infer", "echo_FP32", x_of(stock, X * int(request_id)), **more)
    stock("async_stream_infer", "nosuch", x_of(stock))
    stock("async_stream_infer", "echo_FP32", x_of(stock), sequence_id=7, sequence_start=True)
    told = [ends.get(timeout=60) for _ in range(4)]
    stock("stop_stream")
    for index in (0, 1):
        result, error = told[index]
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("y"), X * (index + 1))
        response = result.get_response()
        assert response.id == str(index + 1)
        assert response.parameters["triton_final_response"].bool_param
    assert "unknown model" in str(told[2][1])
    assert "keeps no state" in str(told[3][1])


@pytest.mark.parametrize("stock", ["grpc.aio"], indirect=True)
def test_the_same_with_coroutines(stock: Stock) -> None:
    async def asked() -> AsyncIterator[dict[str, Any]]:
        for model, request_id in (("echo_FP32", "1"), ("nosuch", "2"), ("echo_FP32", "3")):
            yield {"model_name": model, "inputs": x_of(stock), "request_id": request_id}

    async def told() -> list[Any]:
        return [end async for end in stock.client.stream_infer(asked())]

    first, second, third = stock.wait(told())
    assert [first[0].get_response().id, third[0].get_response().id] == ["1", "3"]
    assert "unknown model" in str(second[1])


@pytest.mark.parametrize("stock", ["http", "http.aio"], indirect=True)
def test_a_body_can_be_made_and_read_without_the_client(stock: Stock) -> None:
    import urllib.request

    body, length = stock("generate_request_body", x_of(stock), outputs=[stock.wish("y")], request_id="7")
    head = {"Inference-Header-Content-Length": str(length)} if length else {}
    url = f"{stock.server.http_url}/v2/models/echo_FP32/infer"
    with urllib.request.urlopen(urllib.request.Request(url, body, head), timeout=60) as response:
        size = response.headers["Inference-Header-Content-Length"]
        found = stock("parse_response_body", response.read(), header_length=int(size))
    np.testing.assert_array_equal(found.as_numpy("y"), X)
    assert json.loads(body[:length])["id"] == found.get_response()["id"] == "7"
