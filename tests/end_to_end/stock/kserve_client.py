"""KServe's clients asking a server; prints what came as JSON.

In a process of its own, for the messages of its gRPC clash with tritonclient's.

python kserve_client.py http://HOST:PORT HOST:PORT
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from typing import Any

import grpc
import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest
from kserve.inference_client import RESTConfig

X = np.array([[1.5, -2.0, 3.0]], np.float32)
WORDS = np.array([["one two", "größer", ""]], object)


def request(model: str, data: Any, datatype: str, *, binary: bool = True, **parameters: Any) -> InferRequest:
    tensor = InferInput("x", list(data.shape), datatype)
    tensor.set_data_from_numpy(data, binary_data=binary)
    return InferRequest(model, [tensor], request_id="7", parameters=parameters or None)


def plain(response: Any) -> Any:
    found = response.outputs[0].as_numpy().tolist()
    text = [[one.decode() if isinstance(one, bytes) else one for one in row] for row in found]
    return [response.id, response.model_name, text]


async def rest(base: str) -> dict[str, Any]:
    client = InferenceRESTClient(RESTConfig(protocol="v2"))

    async def infer(asked: InferRequest, **more: Any) -> Any:
        try:
            return plain(await client.infer(base, asked, model_name=asked.model_name, **more))
        except httpx.HTTPStatusError as error:
            return [error.response.status_code, str(error)]

    found = {
        "live": await client.is_server_live(base),
        "ready": await client.is_server_ready(base),
        "model ready": await client.is_model_ready(base, "echo_FP32"),
        "other ready": await client.is_model_ready(base, "nosuch"),
        "binary": await infer(request("echo_FP32", X, "FP32")),
        "json": await infer(request("echo_FP32", X, "FP32", binary=False, slo_ms=5000)),
        "text": await infer(request("echo_BYTES", WORDS, "BYTES")),
        "unknown": await infer(request("nosuch", X, "FP32")),
        "late": await infer(request("slow", np.zeros((1, 4), np.float32), "FP32"), headers={"x-slo-ms": "1"}),
    }
    await client.close()
    return found


async def rpc(url: str) -> dict[str, Any]:
    client = InferenceGRPCClient(url)

    async def infer(asked: InferRequest, **more: Any) -> Any:
        try:
            return plain(await client.infer(asked, **more))
        except grpc.RpcError as error:
            return [error.code().name, error.details()]

    found = {
        "live": await client.is_server_live(),
        "ready": await client.is_server_ready(),
        "model ready": await client.is_model_ready("echo_FP32"),
        "other ready": await client.is_model_ready("nosuch"),
        "binary": await infer(request("echo_FP32", X, "FP32")),
        "typed": await infer(request("echo_FP32", X, "FP32", binary=False, slo_ms=5000)),
        "text": await infer(request("echo_BYTES", WORDS, "BYTES")),
        "unknown": await infer(request("nosuch", X, "FP32")),
        "late": await infer(
            request("slow", np.zeros((1, 4), np.float32), "FP32"), headers=(("x-slo-ms", "1"),)
        ),
    }
    await client.close()
    return found


async def both(http_url: str, grpc_url: str) -> None:
    json.dump({"http": await rest(http_url), "grpc": await rpc(grpc_url)}, sys.stdout)


if __name__ == "__main__":
    logging.disable()
    asyncio.run(both(*sys.argv[1:]))
