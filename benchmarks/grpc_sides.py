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
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import msgspec
import uvloop

from clockwork_serve.messages import (
    Answer,
    Code,
    CodeAdded,
    Frame,
    Model,
    ModelAdded,
    Outcome,
    Profile,
    Readiness,
    Request,
    Role,
    TensorRef,
    Tensors,
    TensorSpec,
    Weights,
)
from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, ModelInferRequest, ModelInferResponse
from clockwork_serve.serve.controller_process import SOCKET_NAME
from clockwork_serve.serve.gateway_process import GatewayConfig, serve
from clockwork_serve.serve.logs import configure
from clockwork_serve.serve.transport import Link, hello, listen
from clockwork_serve.units import MIB, ms

MODEL: Final = "echo"
METHOD: Final = f"/{INFERENCE_SERVICE}/ModelInfer"
THREADS: Final = 8


def request(tensor_bytes: int) -> bytes:
    """A ``ModelInferRequest``."""
    found = ModelInferRequest(model_name=MODEL, raw_input_contents=[bytes(tensor_bytes)])
    found.inputs.add(name="X", datatype="FP32", shape=[tensor_bytes // 4])
    encoded: bytes = found.SerializeToString()
    return encoded


def answered(asked: Any) -> Any:
    """The least that parses and answers the same messages."""
    tensor = asked.inputs[0]
    found = ModelInferResponse(
        model_name=asked.model_name, model_version="1", id=asked.id,
        raw_output_contents=[asked.raw_input_contents[0]],
    )  # fmt: skip
    found.outputs.add(name="Y", datatype=tensor.datatype, shape=tensor.shape)
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


async def gateway(run_dir: str, port: int, output_bytes: int) -> None:
    """A gateway at that port; it finds the stand-in in the folder."""
    region_bytes = max(256 * MIB, 256 * output_bytes)
    config = GatewayConfig(
        run_dir=run_dir, name="gateway", http_port=0, grpc_port=port, metrics_port=None,
        default_slo_ns=ms(60_000), region_bytes=region_bytes,
    )  # fmt: skip
    configure("gateway", "warning", "text")
    print(port, flush=True)
    await serve(config, asyncio.Event())


class StandIn:
    """A controller with one model, whose output is as large as its input, and never written."""

    def __init__(self, output_bytes: int) -> None:
        output = TensorSpec(name="Y", datatype="FP32", shape=(-1,))
        code = Code(
            code_id="code", backend="onnx", path="/nowhere", batched=False, batch_sizes=(1,), lifted=True,
            inputs=(TensorSpec(name="X", datatype="FP32", shape=(-1,)),), outputs=(output,),
        )  # fmt: skip
        profile = Profile(
            code_id="code", device_kind="cpu", infer_ns={1: ms(1)}, load_base_ns=0, load_ns_per_mib=0
        )
        model = Model(
            key=f"{MODEL}/1", name=MODEL, version="1", code_id="code", platform="none", max_batch_size=0,
            weights=Weights(weights_id="w", path="/nowhere", size=1), batch_sizes=(1,), config=b"{}",
            output_bytes=output_bytes,
        )  # fmt: skip
        self._catalogue = (
            CodeAdded(code=code, profiles=(profile,)), ModelAdded(model=model), Readiness(ready=True),
        )  # fmt: skip
        self._output_bytes = output_bytes
        self._decode = msgspec.msgpack.Decoder(Tensors).decode
        self._encode = msgspec.msgpack.Encoder().encode

    def greet(self, link: Link) -> None:
        """Tell a gateway what is served."""
        for frame in self._catalogue:
            link.send(frame)

    def answer(self, link: Link, frames: list[Frame]) -> None:
        """Answer all."""
        for frame in frames:
            if isinstance(frame, Request):
                link.send(self._answer(frame))

    def _answer(self, asked: Request) -> Answer:
        tensors = self._decode(asked.tensors)
        ref = TensorRef(
            name="Y", datatype="FP32", shape=(self._output_bytes // 4,), offset=tensors.output_offset,
            nbytes=self._output_bytes,
        )  # fmt: skip
        outputs = self._encode(msgspec.structs.replace(tensors, refs=(ref,)))
        return Answer(
            request_id=asked.request_id, gateway=asked.gateway, outcome=Outcome.OK, outputs=outputs, batch=1,
            exec_ns=ms(1), queue_ns=ms(1), expected_ns=ms(1),
        )  # fmt: skip


async def stand_in(run_dir: str, output_bytes: int) -> None:
    """The gateway's controller."""
    made = StandIn(output_bytes)
    own = hello(Role.CONTROLLER, "controller")
    await listen(Path(run_dir) / SOCKET_NAME, own, made.greet, made.answer, lambda link: None)
    print(0, flush=True)
    await asyncio.Event().wait()


def main(side: str, core: str, run_dir: str, port: str, tensor_bytes: str) -> None:
    """Run one side on one core until it is killed."""
    os.sched_setaffinity(0, {int(core)})
    if side == "sync":
        bare_sync()
    else:
        bodies: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
            "aio": bare_aio,
            "gateway": lambda: gateway(run_dir, int(port), int(tensor_bytes)),
            "stand-in": lambda: stand_in(run_dir, int(tensor_bytes)),
        }
        uvloop.run(bodies[side]())


if __name__ == "__main__":
    main(*sys.argv[1:])
