"""A server that answers every inference at once and does nothing else, to measure a load generator with.

``python -m benchmarks.generator_capacity.trivial_server http|grpc`` prints its port, and ends with its
standard input. It speaks just enough of the Open Inference Protocol.
"""

from __future__ import annotations

import asyncio
import struct
import sys
from typing import cast

import uvloop

from clockwork_lab.bench.messages import literal
from clockwork_serve.oip.protobuf import ModelInferResponse, message

FLOATS = 256
_METADATA = (
    b'{"name":"m","versions":["1"],"platform":"none","inputs":[{"name":"x","datatype":"FP32","shape":[1,%d]}],'
    b'"outputs":[]}' % FLOATS
)
_ANSWER = b'{"model_name":"m","model_version":"1","outputs":[]}'
_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
_DATA, _HEADERS, _SETTINGS, _PING, _WINDOW = 0, 1, 4, 6, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_OPENING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Http(asyncio.Protocol):
    """Requests one after the other."""

    def __init__(self) -> None:
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer, once all is there."""
        assert self._transport is not None
        received = self._received + data if self._received else data
        end = received.find(b"\r\n\r\n")
        self._received = received
        if end < 0:
            return
        body = _METADATA
        if received.startswith(b"POST"):
            at = received.find(b"\r\nContent-Length: ") + 18
            if len(received) < end + 4 + int(received[at : received.find(b"\r", at)]):
                return
            body = _ANSWER
        self._received = b""
        self._transport.write(_OK % (len(body), body))


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + content


def _answer_of(record: object) -> bytes:
    content: bytes = record.SerializeToString()  # type: ignore[attr-defined]
    return b"\0" + len(content).to_bytes(4, "big") + content


class Grpc(asyncio.Protocol):
    """Calls; which of the two methods one is for is told by the length of its request."""

    def __init__(self) -> None:
        self._received = b""
        self._greeted = False
        self._unread = 0
        self._transport: asyncio.Transport | None = None
        self._sizes: dict[int, int] = {}
        metadata = message("inference.ModelMetadataResponse")(name="m")
        metadata.inputs.add(name="x", datatype="FP32", shape=(1, FLOATS))
        self._metadata = _answer_of(metadata)
        self._answer = _answer_of(ModelInferResponse(model_name="m", model_version="1"))
        self._head = b"\x88" + literal("content-type", "application/grpc")
        self._trailers = literal("grpc-status", "0")

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        settings = struct.pack(">HIHI", 1, 0, 4, 2**31 - 1)
        more = struct.pack(">I", 2**31 - 1 - 65_535)
        self._transport.write(_frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW, 0, 0, more))

    def data_received(self, data: bytes) -> None:
        """Answer the calls that are whole."""
        assert self._transport is not None
        received = self._received + data if self._received else data
        at = 0
        sent: list[bytes] = []
        if not self._greeted and len(received) >= len(_OPENING):
            self._greeted, at = True, len(_OPENING)
        while self._greeted and len(received) - at >= 9:
            end = at + 9 + int.from_bytes(received[at : at + 3], "big")
            if len(received) < end:
                break
            kind, flags, stream = struct.unpack_from(">BBI", received, at + 3)
            if kind == _DATA:
                self._unread += end - at - 9
                size = self._sizes.pop(stream, 0) + end - at - 9
                if flags & _END_STREAM:
                    sent += self._answered(stream, size)
                else:
                    self._sizes[stream] = size
            elif kind in (_SETTINGS, _PING) and not flags & _ACK:
                sent.append(_frame(kind, _ACK, 0, received[at + 9 : end] if kind == _PING else b""))
            at = end
        self._received = received[at:]
        if self._unread > 2**30:
            sent.append(_frame(_WINDOW, 0, 0, struct.pack(">I", self._unread)))
            self._unread = 0
        if sent:
            self._transport.write(b"".join(sent))

    def _answered(self, stream: int, size: int) -> tuple[bytes, bytes, bytes]:
        content = self._answer if size > FLOATS else self._metadata
        return (
            _frame(_HEADERS, _END_HEADERS, stream, self._head),
            _frame(_DATA, 0, stream, content),
            _frame(_HEADERS, _END_HEADERS | _END_STREAM, stream, self._trailers),
        )


async def _serve(kind: str) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Grpc if kind == "grpc" else Http, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    over = asyncio.Event()
    loop.add_reader(0, over.set)
    await over.wait()


if __name__ == "__main__":
    uvloop.run(_serve(sys.argv[1]))
