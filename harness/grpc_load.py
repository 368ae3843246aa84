"""A closed loop of gRPC calls that costs little: frames made once, only the heads of answers' frames read.

grpcio's own clients cost more CPU than the servers measured here. It knows just enough of HTTP/2 to ask
such a server: no padding, no continuation, no compression of headers.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections.abc import Sequence
from typing import Final

_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GO_AWAY, _WINDOW = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_HEAD_BYTES: Final = 9
_LARGEST_WINDOW: Final = 2**31 - 1
_FIRST_WINDOW: Final = 65_535
_FRAME_BYTES: Final = 16_384
_READ_BYTES: Final = 256 * 1024
ROOM_BYTES: Final = 60_000
"""What a server takes at least before it says that there is room for more, which is not waited for."""
_POST, _HTTP = b"\x83", b"\x86"  # what HPACK's static table calls ":method: POST" and ":scheme: http"


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + content


def _header(name: str, value: str) -> bytes:
    # Literal, without indexing: all requests are the same bytes.
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class _Connection:
    """Keeps ``in_flight`` calls open."""

    def __init__(self, port: int, path: str, message: bytes, in_flight: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._headers = b"".join(
            (
                _POST, _HTTP, _header(":path", path), _header(":authority", "localhost"),
                _header("te", "trailers"), _header("content-type", "application/grpc"),
            )
        )  # fmt: skip
        self._data = b"\0" + len(message).to_bytes(4, "big") + message
        self._stream = 1
        self._received = b""
        self._unread = 0  # bytes of messages since the server was told that they were read
        self._answered: set[int] = set()
        self.done = 0
        self.failed = 0
        self.socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(_SETTINGS, 0, 0, struct.pack(">HI", 4, _LARGEST_WINDOW))
            + _frame(_WINDOW, 0, 0, struct.pack(">I", _LARGEST_WINDOW - _FIRST_WINDOW))
            + b"".join(self._call() for _ in range(in_flight))
        )

    def read(self) -> None:
        """Take what came, and make a call for each that ended."""
        received = self._received + self.socket.recv(_READ_BYTES)
        at, sent = 0, []
        while len(received) - at >= _HEAD_BYTES:
            length = int.from_bytes(received[at : at + 3], "big")
            end = at + _HEAD_BYTES + length
            if len(received) < end:
                break
            kind, flags, stream = struct.unpack_from(">BBI", received, at + 3)
            sent += self._taken(kind, flags, stream, received[at + _HEAD_BYTES : end])
            at = end
        self._received = received[at:]
        if sent:
            self.socket.sendall(b"".join(sent))

    def _taken(self, kind: int, flags: int, stream: int, content: bytes) -> list[bytes]:
        if kind == _SETTINGS and not flags & _ACK:
            return [_frame(_SETTINGS, _ACK, 0, b"")]
        if kind == _PING and not flags & _ACK:
            return [_frame(_PING, _ACK, 0, content)]
        assert kind != _GO_AWAY, content
        sent = []
        if kind == _DATA:
            self._answered.add(stream)
            self._unread += len(content)
            if self._unread > _LARGEST_WINDOW // 2:
                sent.append(_frame(_WINDOW, 0, 0, struct.pack(">I", self._unread)))
                self._unread = 0
        if kind == _RESET or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
            self.done += 1
            # An error has no message.
            self.failed += stream not in self._answered
            self._answered.discard(stream)
            sent.append(self._call())
        return sent

    def _call(self) -> bytes:
        stream, self._stream = self._stream, self._stream + 2
        data = self._data
        frames = [_frame(_HEADERS, _END_HEADERS, stream, self._headers)]
        for at in range(0, len(data), _FRAME_BYTES):
            part = data[at : at + _FRAME_BYTES]
            frames.append(_frame(_DATA, _END_STREAM * (at + _FRAME_BYTES >= len(data)), stream, part))
        return b"".join(frames)


class Load:
    """Calls of one method with one message, at most ``ROOM_BYTES`` of them in flight per connection."""

    def __init__(self, port: int, path: str, message: bytes, in_flight: Sequence[int]) -> None:
        self._connections = [_Connection(port, path, message, count) for count in in_flight]
        self._selector = selectors.DefaultSelector()
        for connection in self._connections:
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    @property
    def done(self) -> int:
        """Calls that have ended."""
        return sum(connection.done for connection in self._connections)

    @property
    def failed(self) -> int:
        """Those of them without an answer."""
        return sum(connection.failed for connection in self._connections)

    def run(self, seconds: float) -> None:
        """Go on for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for key, _ in self._selector.select(0.1):
                key.data.read()

    def close(self) -> None:
        """End all connections."""
        self._selector.close()
        for connection in self._connections:
            connection.socket.close()
