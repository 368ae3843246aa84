"""The least that a server of its kind can do, as processes to compare with; each prints its address.

``http``: httptools on uvloop parses the same JSON header and answers at once. ``frames``: a request is two
lengths, a msgpack header and a tensor, received into a buffer that is used again. ``controller``: a stand-in
that has every request answered at once, so that a gateway can be measured alone.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, Final, cast

import httptools
import msgspec
import uvloop

from clockwork_serve.units import MIB
from harness.lean_load import LENGTHS
from harness.stand_in import StandIn

OUTPUT_FLOATS: Final = 16
OUTPUT: Final = bytes(4 * OUTPUT_FLOATS)


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


async def _serve(kind: str, given: str) -> None:
    loop = asyncio.get_running_loop()
    if kind == "controller":
        run_dir, _, floats = given.rpartition(":")
        await StandIn(int(floats), OUTPUT_FLOATS).listen(run_dir)
        print(run_dir, flush=True)
    else:
        protocol = HttpYardstick if kind == "http" else FrameYardstick
        server = await loop.create_server(protocol, "127.0.0.1", 0, backlog=512)
        print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1], sys.argv[2]))
