"""One case for each public method of the stock clients: call it, check what came, say which."""

from __future__ import annotations

import base64
import os
import queue
import urllib.request
from collections.abc import AsyncIterator, Callable
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import numpy as np
from tritonclient.utils import InferenceServerException

from tests.end_to_end.stock.conftest import Stock

WORKS = "✓"
X = np.array([[1.5, -2.0, 3.0]], np.float32)
Case = Callable[[Stock], str]


def x_of(stock: Stock, data: Any = X) -> list[Any]:
    return [stock.tensor("x", data, "FP32")]


def check(result: Any, data: Any = X) -> str:
    np.testing.assert_array_equal(result.as_numpy("y"), data)
    return WORKS


def is_server_live(stock: Stock) -> str:
    assert stock("is_server_live") is True
    return WORKS


def is_server_ready(stock: Stock) -> str:
    assert stock("is_server_ready") is True
    return WORKS


def is_model_ready(stock: Stock) -> str:
    assert stock("is_model_ready", "echo_FP32") is True
    assert stock("is_model_ready", "echo_FP32", "1") is True
    assert stock("is_model_ready", "nosuch") is False
    return WORKS


def get_server_metadata(stock: Stock) -> str:
    found = stock.plain("get_server_metadata")
    assert found["name"] == "clockwork-serve"
    assert {"binary_tensor_data", "classification", "statistics"} <= set(found["extensions"])
    # What is refused is not promised.
    assert not {"sequence", "cuda_shared_memory", "trace", "logging"} & set(found["extensions"])
    return WORKS


def get_model_metadata(stock: Stock) -> str:
    found = stock.plain("get_model_metadata", "echo_INT64", "1")
    assert (found["name"], found["versions"], found["platform"]) == ("echo_INT64", ["1"], "onnxruntime_onnx")
    (x,) = found["inputs"]
    assert (x["name"], x["datatype"], [int(dim) for dim in x["shape"]]) == ("x", "INT64", [-1, 3])
    return WORKS


def get_model_config(stock: Stock) -> str:
    found = stock.plain("get_model_config", "mlp")
    found = found.get("config", found)
    assert (found["name"], found["max_batch_size"], found["input"][0]["data_type"]) == (
        "mlp",
        16,
        "TYPE_FP32",
    )
    return WORKS


def get_model_repository_index(stock: Stock) -> str:
    found = stock.plain("get_model_repository_index")
    states = {model["name"]: model["state"] for model in (found["models"] if stock.grpc else found)}
    assert states["echo_FP32"] == "READY"
    return WORKS


def get_inference_statistics(stock: Stock) -> str:
    def count() -> int:
        (record,) = stock.plain("get_inference_statistics", "echo_FP32", "1")["model_stats"]
        return int(record["inference_stats"]["success"].get("count", 0))

    before = count()
    stock("infer", "echo_FP32", x_of(stock))
    assert count() == before + 1
    assert len(stock.plain("get_inference_statistics")["model_stats"]) > 10
    return WORKS


def load_model(stock: Stock) -> str:
    stock("load_model", "spare")
    assert stock("is_model_ready", "spare")
    bad = "INVALID_ARGUMENT" if stock.grpc else "400"
    polled = "failed to load 'nosuch', failed to poll from model repository"
    assert stock.refusal("load_model", "nosuch", words=polled) in {"404", "NOT_FOUND"}
    only = "failed to load 'spare', .*from the repository only"
    assert stock.refusal("load_model", "spare", config="{}", words=only) == bad
    if stock.aio and not hasattr(stock.module, "base64"):
        return WORKS  # this release forgot to import it, and sends no files
    files = {"file:1/model.onnx": b"bytes"}
    assert stock.refusal("load_model", "spare", config="{}", files=files, words="repository only") == bad
    return WORKS


def unload_model(stock: Stock) -> str:
    stock("unload_model", "spare")
    x = x_of(stock, np.ones((1, 4), np.float32))
    assert stock.refusal("infer", "spare", x, words="unknown model") in {"404", "NOT_FOUND"}
    stock("load_model", "spare")
    return check(stock("infer", "spare", x), np.ones((1, 4), np.float32))


def infer(stock: Stock) -> str:
    return check(stock("infer", "echo_FP32", x_of(stock)))


def async_infer(stock: Stock) -> str:
    if not stock.grpc:
        return check(stock("async_infer", "echo_FP32", x_of(stock)).get_result())
    ends: queue.Queue[Any] = queue.Queue()

    def told(result: Any, error: Any) -> None:
        ends.put((result, error))

    stock("async_infer", "echo_FP32", x_of(stock), told)
    result, error = ends.get(timeout=60)
    assert error is None
    check(result)
    stock("async_infer", "slow", x_of(stock, np.zeros((1, 4), np.float32)), told).cancel()
    result, error = ends.get(timeout=60)
    assert result is None
    assert isinstance(error, InferenceServerException)
    return WORKS


def stream(stock: Stock) -> str:
    """All three methods of a stream: answered, then cancelled."""
    for cancel in (False, True):
        ends: queue.Queue[Any] = queue.Queue()
        stock("start_stream", callback=lambda result, error, ends=ends: ends.put((result, error)))
        model, data = ("slow", np.zeros((1, 4), np.float32)) if cancel else ("echo_FP32", X)
        stock("async_stream_infer", model, x_of(stock, data), request_id="7")
        if cancel:
            stock("stop_stream", cancel_requests=True)
            assert ends.get(timeout=60)[1].status() == "StatusCode.CANCELLED"
        else:
            result, error = ends.get(timeout=60)
            assert (error, result.get_response().id) == (None, "7")
            check(result)
            stock("stop_stream")
    return WORKS


def stream_infer(stock: Stock) -> str:
    async def asked() -> AsyncIterator[dict[str, Any]]:
        for request_id in ("1", "2"):
            yield {"model_name": "echo_FP32", "inputs": x_of(stock), "request_id": request_id}

    async def told() -> list[Any]:
        return [end async for end in stock("stream_infer", asked())]

    ends = stock.wait(told())
    assert [result.get_response().id for result, _ in ends] == ["1", "2"]
    return check(ends[0][0])


def generate_request_body(stock: Stock) -> str:
    """Both halves of a request sent by hand."""
    body, length = stock("generate_request_body", x_of(stock), request_id="7")
    request = urllib.request.Request(
        f"{stock.server.http_url}/v2/models/echo_FP32/infer", body,
        {"Inference-Header-Content-Length": str(length)},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=60) as response:
        size = int(response.headers["Inference-Header-Content-Length"])
        found = stock("parse_response_body", response.read(), header_length=size)
    assert found.get_response()["id"] == "7"
    return check(found)


def plugin(stock: Stock) -> str:
    """A plugin's header reaches the server, which refuses this one, until the plugin is gone."""

    class Impatient:
        def __call__(self, request: Any) -> None:
            request.headers["x-slo-ms"] = "soon"

    impatient = Impatient()
    stock("register_plugin", impatient)
    assert stock("plugin") is impatient
    bad = "INVALID_ARGUMENT" if stock.grpc else "400"
    assert stock.refusal("infer", "echo_FP32", x_of(stock), words="'x-slo-ms'") == bad
    stock("unregister_plugin")
    return check(stock("infer", "echo_FP32", x_of(stock)))


def close(stock: Stock) -> str:
    other = Stock(stock.name, stock.server)
    infer(other)
    other.close()
    stock.called |= other.called
    return WORKS


# What may be read and not changed


def settings(found: Any) -> dict[str, Any]:
    """Settings of either protocol."""
    values = found.get("settings", found)
    return {
        name: next(iter(value.values())) if isinstance(value, dict) else value
        for name, value in values.items()
    }


def get_trace_settings(stock: Stock) -> str:
    for model in (None, "echo_FP32"):
        assert settings(stock.plain("get_trace_settings", model)) == {"trace_level": ["OFF"]}
    return WORKS


def update_trace_settings(stock: Stock) -> str:
    off = {"trace_level": ["OFF"]}
    assert settings(stock.plain("update_trace_settings", "echo_FP32", off)) == off
    on = {"trace_level": ["TIMESTAMPS"]}
    return stock.refusal("update_trace_settings", settings=on, words="cannot be changed")


def get_log_settings(stock: Stock) -> str:
    assert settings(stock.plain("get_log_settings"))["log_error"] is True
    return WORKS


def update_log_settings(stock: Stock) -> str:
    assert settings(stock.plain("update_log_settings", {"log_error": True}))["log_error"] is True
    return stock.refusal("update_log_settings", {"log_verbose_level": 3}, words="cannot be changed")


# Shared memory


def system_shared_memory(stock: Stock) -> str:
    """Register, ask about it, infer with it, unregister; or the code with which the first is refused."""
    name, size = "stock", X.nbytes
    region = SharedMemory(f"clockwork-stock-{os.getpid()}", create=True, size=size)
    try:
        region.buf[:size] = X.tobytes()
        try:
            stock("register_system_shared_memory", name, f"/{region.name}", size)
        except InferenceServerException as error:
            code = str(error.status()).removeprefix("StatusCode.")
            assert code in {"501", "UNIMPLEMENTED"}
            for method in ("get_system_shared_memory_status", "unregister_system_shared_memory"):
                assert stock.refusal(method, words="not supported|--shared-memory") == code
            return code
        found = stock.plain("get_system_shared_memory_status")
        listed = found.get("regions", {}) if stock.grpc else {each["name"]: each for each in found}
        assert int(listed[name]["byte_size"]) == size
        tensor = stock.module.InferInput("x", list(X.shape), "FP32")
        tensor.set_shared_memory(name, size)
        check(stock("infer", "echo_FP32", [tensor]))
        stock("unregister_system_shared_memory", name)
    finally:
        region.close()
        region.unlink()
    return WORKS


def register_cuda_shared_memory(stock: Stock) -> str:
    handle = base64.b64encode(bytes(64))
    return stock.refusal("register_cuda_shared_memory", "region", handle, 0, 64, words="not supported")


def get_cuda_shared_memory_status(stock: Stock) -> str:
    assert stock.plain("get_cuda_shared_memory_status") in ([], {})
    absent = stock.refusal("get_cuda_shared_memory_status", "region", words="Unable to find cuda")
    assert absent in {"404", "NOT_FOUND"}
    return WORKS


def unregister_cuda_shared_memory(stock: Stock) -> str:
    stock("unregister_cuda_shared_memory")
    stock("unregister_cuda_shared_memory", "region")
    return WORKS


CASES: dict[str, Case] = {
    "is_server_live": is_server_live,
    "is_server_ready": is_server_ready,
    "is_model_ready": is_model_ready,
    "get_server_metadata": get_server_metadata,
    "get_model_metadata": get_model_metadata,
    "get_model_config": get_model_config,
    "get_model_repository_index": get_model_repository_index,
    "load_model": load_model,
    "unload_model": unload_model,
    "get_inference_statistics": get_inference_statistics,
    "infer": infer,
    "async_infer": async_infer,
    **dict.fromkeys(("start_stream", "async_stream_infer", "stop_stream"), stream),
    "stream_infer": stream_infer,
    **dict.fromkeys(("generate_request_body", "parse_response_body"), generate_request_body),
    **dict.fromkeys(("register_plugin", "plugin", "unregister_plugin"), plugin),
    "close": close,
    "get_trace_settings": get_trace_settings,
    "update_trace_settings": update_trace_settings,
    "get_log_settings": get_log_settings,
    "update_log_settings": update_log_settings,
    **dict.fromkeys(
        (
            "register_system_shared_memory",
            "get_system_shared_memory_status",
            "unregister_system_shared_memory",
        ),
        system_shared_memory,
    ),
    "register_cuda_shared_memory": register_cuda_shared_memory,
    "get_cuda_shared_memory_status": get_cuda_shared_memory_status,
    "unregister_cuda_shared_memory": unregister_cuda_shared_memory,
}
"""By method, in the order of the table in ``docs/use/clients.md``."""
