"""The least that a server of its kind can do, as processes to compare with; each prints its address.

``http``: httptools on uvloop parses the same JSON header and answers at once. ``frames``: a request is two
lengths, a msgpack header and a tensor, received into a buffer that is used again. ``controller``: a stand-in
that has every request answered at once, so that a gateway can be measured alone.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from pathlib import Path
from typing import Any, Final, cast

import httptools
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
from clockwork_serve.serve.transport import SOCKET_NAME, Link, hello, listen
from clockwork_serve.units import MIB, ms

OUTPUT_FLOATS: Final = 16
OUTPUT: Final = bytes(4 * OUTPUT_FLOATS)
LENGTHS: Final = struct.Struct("<II")
"""A frame's: of its header, and of its tensor."""


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] | None = None


class _Head(msgspec.Struct):
    inputs: list[_Tensor]
    parameters: dict[str, Any] | None = None


_ANSWER: Final = msgspec.json.encode(
    {
        "model_name": "m",
        "model_version": "1",
        "outputs": [
            {"name": "y", "datatype": "FP32", "shape": [1, OUTPUT_FLOATS],
             "parameters": {"binary_data_size": len(OUTPUT)}}
        ],
    }
)  # fmt: skip
_heads = msgspec.json.Decoder(_Head)
_frame_heads = msgspec.msgpack.Decoder(_Head)


class HttpYardstick(asyncio.Protocol):
    """Reads a whole request, looks at its tensor, answers at once."""

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport | None = None
        self._header_length = 0
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Parse."""
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Remember the only one that is needed."""
        if name.lower() == b"inference-header-content-length":
            self._header_length = int(value)

    def on_body(self, data: bytes) -> None:
        """Collect."""
        self._body.append(data)

    def on_message_complete(self) -> None:
        """Answer."""
        body = memoryview(b"".join(self._body))
        self._body.clear()
        head = _heads.decode(body[: self._header_length])
        size = (head.inputs[0].parameters or {})["binary_data_size"]
        assert len(body) == self._header_length + size
        assert self._transport is not None
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n"
            b"Inference-Header-Content-Length: %d\r\n\r\n%s%s"
            % (len(_ANSWER) + len(OUTPUT), len(_ANSWER), _ANSWER, OUTPUT)
        )


class FrameYardstick(asyncio.BufferedProtocol):
    """Receives frames into one buffer and answers each at once with a small one."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(MIB))
        self._end = 0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client came."""
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._buffer[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """One request at a time is on a connection."""
        self._end += nbytes
        if self._end < LENGTHS.size:
            return
        head_bytes, tensor_bytes = LENGTHS.unpack_from(self._buffer)
        if self._end < LENGTHS.size + head_bytes + tensor_bytes:
            return
        _frame_heads.decode(self._buffer[LENGTHS.size : LENGTHS.size + head_bytes])
        self._end = 0
        assert self._transport is not None
        self._transport.write(LENGTHS.pack(len(_ANSWER), len(OUTPUT)) + _ANSWER + OUTPUT)


class StandIn:
    """A controller that answers every request at once, for a model ``m`` of ``floats`` numbers."""

    def __init__(self, floats: int) -> None:
        spec = TensorSpec(name="x", datatype="FP32", shape=(floats,))
        output = TensorSpec(name="y", datatype="FP32", shape=(OUTPUT_FLOATS,))
        code = Code(
            code_id="c", backend="onnx", path="/nowhere", inputs=(spec,), outputs=(output,), batched=True,
            batch_sizes=(1, 2, 4, 8), lifted=True,
        )  # fmt: skip
        profile = Profile(
            code_id="c", device_kind="cpu", infer_ns={1: ms(1)}, load_base_ns=0, load_ns_per_mib=0
        )
        model = Model(
            key="m/1", name="m", version="1", code_id="c",
            weights=Weights(weights_id="w", path="/nowhere", size=1), platform="onnxruntime_onnx",
            max_batch_size=8, batch_sizes=(1, 2, 4, 8), output_bytes=len(OUTPUT),
            config=b"{}",
        )  # fmt: skip
        self._catalogue: tuple[Frame, ...] = (
            CodeAdded(code=code, profiles=(profile,)),
            ModelAdded(model=model),
            Readiness(ready=True),
        )
        self._decode = msgspec.msgpack.Decoder(Tensors).decode
        self._encode = msgspec.msgpack.Encoder().encode

    def on_link(self, link: Link) -> None:
        """A gateway came."""
        for frame in self._catalogue:
            link.send(frame)

    def on_frames(self, link: Link, frames: list[Frame]) -> None:
        """Answer: the output is whatever is where outputs go."""
        for frame in frames:
            if not isinstance(frame, Request):
                continue
            tensors = self._decode(frame.tensors)
            ref = TensorRef(
                name="y", datatype="FP32", shape=(1, OUTPUT_FLOATS), offset=tensors.output_offset,
                nbytes=len(OUTPUT),
            )  # fmt: skip
            outputs = self._encode(msgspec.structs.replace(tensors, refs=(ref,)))
            link.send(
                Answer(
                    request_id=frame.request_id, gateway=frame.gateway, outcome=Outcome.OK, outputs=outputs,
                    batch=1, exec_ns=1000, queue_ns=1000, expected_ns=1000,
                )
            )  # fmt: skip


async def _serve(kind: str, given: str) -> None:
    loop = asyncio.get_running_loop()
    if kind == "controller":
        run_dir, _, floats = given.rpartition(":")
        stand_in = StandIn(int(floats))
        path = Path(run_dir) / SOCKET_NAME
        await listen(
            path, hello(Role.CONTROLLER, "controller"), stand_in.on_link, stand_in.on_frames, lambda _: None
        )
        print(path, flush=True)
    else:
        protocol = HttpYardstick if kind == "http" else FrameYardstick
        server = await loop.create_server(protocol, "127.0.0.1", 0, backlog=512)
        print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1], sys.argv[2]))
