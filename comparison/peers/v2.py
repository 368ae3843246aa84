"""Requests of the Open Inference Protocol and their answers, made and read by hand; it sends nothing."""

from __future__ import annotations

import json
from typing import Any, Final

import numpy as np

from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, ModelInferRequest, ModelInferResponse
from comparison.peers.peer import Answer, Floats, Request

METHOD: Final = f"/{INFERENCE_SERVICE}/ModelInfer"


def http_request(
    x: Floats, *, headers: tuple[tuple[str, str], ...] = (), parameters: dict[str, Any] | None = None
) -> Request:
    """With binary tensors both ways."""
    data = x.tobytes()
    head = {
        "inputs": [{
            "name": "x", "shape": [1, *x.shape[1:]], "datatype": "FP32",
            "parameters": {"binary_data_size": len(data)},
        }],
        "parameters": {"binary_data_output": True, **(parameters or {})},
    }  # fmt: skip
    text = json.dumps(head).encode()
    return Request(
        "/v2/models/{model}/infer",
        (
            ("Content-Type", "application/octet-stream"),
            ("Inference-Header-Content-Length", str(len(text))),
            *headers,
        ),
        text + data,
    )


def http_output(answer: Answer) -> Floats:
    """The first tensor of a binary response."""
    length = int(answer.headers["inference-header-content-length"])
    return np.frombuffer(answer.body[length:], np.float32)


def grpc_request(names: tuple[str, ...], x: Floats) -> Request:
    """With raw tensors; one message for each model, which names it."""
    messages = {}
    for name in names:
        message = ModelInferRequest(model_name=name, raw_input_contents=[x.tobytes()])
        message.inputs.add(name="x", datatype="FP32", shape=[1, *x.shape[1:]])
        messages[name] = message.SerializeToString()
    return Request(METHOD, messages=messages)


def grpc_output(answer: Answer) -> Floats:
    """The first tensor of a raw response, or of a typed one."""
    message = ModelInferResponse.FromString(answer.body)
    if message.raw_output_contents:
        return np.frombuffer(message.raw_output_contents[0], np.float32)
    return np.asarray(message.outputs[0].contents.fp32_contents, np.float32)
