"""What ``grpc_front_end`` compares, each a process that prints its port: bare echoes, and a gateway alone.

The gateway's controller is a stand-in in a process of its own, which answers whatever comes at once.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from concurrent import futures
from typing import Any, Final

import grpc
import grpc.aio
import uvloop

from clockwork_serve.config import Settings
from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, ModelInferRequest, ModelInferResponse
from clockwork_serve.serve.child import configure
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.grpc.server import FALL_BACK_VARIABLE
from clockwork_serve.serve.processes.gateway import serve
from clockwork_serve.units import MIB
from harness.stand_in import FLOAT_BYTES, MODEL, StandIn

METHOD: Final = f"/{INFERENCE_SERVICE}/ModelInfer"
THREADS: Final = 8
GATEWAY: Final = "gateway"
FALL_BACK: Final = "gateway-aio"
"""The same with ``grpc.aio`` instead of grpcio's own core."""


def request(tensor_bytes: int) -> bytes:
    """A ``ModelInferRequest``."""
    found = ModelInferRequest(model_name=MODEL, raw_input_contents=[bytes(tensor_bytes)])
    found.inputs.add(name="x", datatype="FP32", shape=[1, tensor_bytes // FLOAT_BYTES])
    encoded: bytes = found.SerializeToString()
    return encoded


def answered(asked: Any) -> Any:
    """The least that parses and answers the same messages."""
    tensor = asked.inputs[0]
    found = ModelInferResponse(
        model_name=asked.model_name, model_version="1", id=asked.id,
        raw_output_contents=[asked.raw_input_contents[0]],
    )  # fmt: skip
    found.outputs.add(name="y", datatype=tensor.datatype, shape=tensor.shape)
    return found


def _handlers(answer: Callable[..., Any]) -> Any:
    handler = grpc.unary_unary_rpc_method_handler(
        answer, request_deserializer=ModelInferRequest.FromString,
        response_serializer=ModelInferResponse.SerializeToString,
    )  # fmt: skip
    return (grpc.method_handlers_generic_handler(INFERENCE_SERVICE, {"ModelInfer": handler}),)


def bare_sync() -> None:
    """The server of grpcio with a pool of threads."""
    server = grpc.server(futures.ThreadPoolExecutor(THREADS))
    server.add_generic_rpc_handlers(_handlers(lambda asked, context: answered(asked)))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    signal.pause()


async def bare_aio() -> None:
    """The server of grpcio on an event loop."""

    async def answer(asked: Any, context: Any) -> Any:
        return answered(asked)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers(_handlers(answer))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.Event().wait()


async def gateway(name: str, run_dir: str, port: int, output_bytes: int) -> None:
    """A gateway at that port; it finds the stand-in in the folder."""
    region_bytes = max(256 * MIB, 256 * output_bytes)
    config = GatewayConfig(
        settings=Settings(
            http_port=0, grpc_port=port, metrics_port=None, slo_ms=60_000, gateway_memory=region_bytes
        ),
        run_dir=run_dir,
        name=name,
    )
    configure(name, "warning", "text")
    print(port, flush=True)
    await serve(config, asyncio.Event())


async def stand_in(run_dir: str, tensor_bytes: int) -> None:
    """The gateway's controller."""
    floats = tensor_bytes // FLOAT_BYTES
    await StandIn(floats, floats).listen(run_dir)
    print(0, flush=True)
    await asyncio.Event().wait()


def main(side: str, core: str, run_dir: str, port: str, tensor_bytes: str) -> None:
    """Run one side on one core until it is killed."""
    os.sched_setaffinity(0, {int(core)})
    if side == FALL_BACK:
        os.environ[FALL_BACK_VARIABLE] = "1"
    if side == "sync":
        bare_sync()
    else:
        bodies: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "aio": bare_aio,
            GATEWAY: lambda: gateway(side, run_dir, int(port), int(tensor_bytes)),
            FALL_BACK: lambda: gateway(side, run_dir, int(port), int(tensor_bytes)),
            "stand-in": lambda: stand_in(run_dir, int(tensor_bytes)),
        }
        uvloop.run(bodies[side]())


if __name__ == "__main__":
    main(*sys.argv[1:])
