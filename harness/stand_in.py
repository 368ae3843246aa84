"""A controller that answers every request at once, so that a gateway can be measured alone."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from clockwork_serve.messages import (
    Answer,
    Beat,
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
from clockwork_serve.serve.transport import SOCKET_NAME, Link, hello, listen
from clockwork_serve.units import ms

MODEL: Final = "m"
FLOAT_BYTES: Final = 4


class StandIn:
    """Serves model ``m``: ``floats`` numbers ``x`` in, ``output_floats`` numbers ``y`` out, never written."""

    def __init__(self, floats: int, output_floats: int) -> None:
        self._shape = (1, output_floats)
        self._nbytes = FLOAT_BYTES * output_floats
        code = Code(
            code_id="c", backend="onnx", path="/nowhere", batched=True, batch_sizes=(1,), lifted=True,
            inputs=(TensorSpec(name="x", datatype="FP32", shape=(floats,)),),
            outputs=(TensorSpec(name="y", datatype="FP32", shape=(output_floats,)),),
        )  # fmt: skip
        profile = Profile(
            code_id="c", device_kind="cpu", infer_ns={1: ms(1)}, load_base_ns=0, load_ns_per_mib=0
        )
        model = Model(
            key=f"{MODEL}/1", name=MODEL, version="1", code_id="c", platform="none", max_batch_size=1,
            weights=Weights(weights_id="w", path="/nowhere", size=1), batch_sizes=(1,), config=b"{}",
            output_bytes=self._nbytes,
        )  # fmt: skip
        self._catalogue: tuple[Frame, ...] = (
            CodeAdded(code=code, profiles=(profile,)), ModelAdded(model=model), Readiness(ready=True),
        )  # fmt: skip
        self._decode = msgspec.msgpack.Decoder(Tensors).decode
        self._encode = msgspec.msgpack.Encoder().encode

    async def listen(self, run_dir: str) -> None:
        """Be the controller of the gateways of that folder."""
        own = hello(Role.CONTROLLER, "controller")
        await listen(Path(run_dir) / SOCKET_NAME, own, self._greet, self._answer_all, lambda _: None)

    def _greet(self, link: Link) -> None:
        for frame in self._catalogue:
            link.send(frame)

    def _answer_all(self, link: Link, frames: list[Frame]) -> None:
        for frame in frames:
            if isinstance(frame, Request):
                link.send(self._answer(frame))
            elif isinstance(frame, Beat):
                link.send(frame)

    def _answer(self, asked: Request) -> Answer:
        tensors = self._decode(asked.tensors)
        ref = TensorRef(
            name="y", datatype="FP32", shape=self._shape, offset=tensors.output_offset, nbytes=self._nbytes
        )
        return Answer(
            request_id=asked.request_id, gateway=asked.gateway, outcome=Outcome.OK, batch=1,
            outputs=self._encode(msgspec.structs.replace(tensors, refs=(ref,))),
            exec_ns=ms(1), queue_ns=ms(1), expected_ns=ms(1),
        )  # fmt: skip
