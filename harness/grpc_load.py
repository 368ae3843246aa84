"""gRPC calls that cost little, and a closed loop of them: only the heads of answers' frames are read.

grpcio's own clients cost more CPU than the servers measured here. It knows just enough of HTTP/2 to ask
such a server: no padding, no continuation, no compression of headers.
"""

from __future__ import annotations

import selectors
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, NamedTuple

DATA, HEADERS, RESET, SETTINGS, PING, GO_AWAY, WINDOW = 0, 1, 3, 4, 6, 7, 8
"""Kinds of frames."""
END_STREAM, END_HEADERS, ACK = 1, 4, 1
"""Flags of frames."""
OPENING: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES: Final = 9
LARGEST_WINDOW: Final = 2**31 - 1
FIRST_WINDOW: Final = 65_535
_FRAME_BYTES: Final = 16_384
_READ_BYTES: Final = 256 * 1024
ROOM_BYTES: Final = 60_000
"""What a server takes at least before it says that there is room for more, which is not waited for."""
CONNECT_S: Final = 30.0
HEADER_TABLE, ENABLE_PUSH, INITIAL_WINDOW = 1, 2, 4
"""Settings: the size of the table of headers that answers may refer to, pushes, and each call's window."""
_POST, _HTTP = b"\x83", b"\x86"  # what HPACK's static table calls ":method: POST" and ":scheme: http"


class Ended(NamedTuple):
    """A call that ended: whether a message came, and the block of its trailers, None if it was reset."""

    stream: int
    answered: bool
    trailers: bytes | None


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    """One of HTTP/2."""
    return len(content).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + content


def _header(name: str, value: str) -> bytes:
    # Literal, without indexing: all requests are the same bytes.
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


class Connection:
    """One connection's calls: sent as they are begun, and told apart by their streams once they end.

    ``settings``: HTTP/2's, by number, beside the windows, which never fill.
    """

    def __init__(self, address: tuple[str, int], settings: Mapping[int, int] = MappingProxyType({})) -> None:
        self.socket = socket.create_connection(address, timeout=CONNECT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.next_stream = 1
        self._received = self._go_away = b""
        self._unread = 0  # bytes of messages since the server was told that they were read
        self._answered: set[int] = set()
        windows = {**settings, INITIAL_WINDOW: LARGEST_WINDOW}
        self.socket.sendall(
            OPENING
            + frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *one) for one in windows.items()))
            + frame(WINDOW, 0, 0, struct.pack(">I", LARGEST_WINDOW - FIRST_WINDOW))
        )

    def begin(self, *calls: tuple[bytes, bytes]) -> None:
        """Send calls, each a block of headers and a message with its prefix, on the next streams."""
        frames = []
        for headers, data in calls:
            stream, self.next_stream = self.next_stream, self.next_stream + 2
            frames.append(frame(HEADERS, END_HEADERS, stream, headers))
            for at in range(0, len(data), _FRAME_BYTES):
                part = data[at : at + _FRAME_BYTES]
                ends = END_STREAM * (at + _FRAME_BYTES >= len(data))
                frames.append(frame(DATA, ends, stream, part))
        self.socket.sendall(b"".join(frames))

    def read(self) -> list[Ended]:
        """Take what came: the calls that ended. ConnectionResetError once the server has closed it."""
        data = self.socket.recv(_READ_BYTES, socket.MSG_DONTWAIT)
        if not data:
            raise ConnectionResetError(f"the server closed the connection: {self._go_away!r}")
        received = self._received + data
        at, ended = 0, []
        while len(received) - at >= HEAD_BYTES:
            length = int.from_bytes(received[at : at + 3], "big")
            end = at + HEAD_BYTES + length
            if len(received) < end:
                break
            kind, flags, stream = struct.unpack_from(">BBI", received, at + 3)
            one = self._take(kind, flags, stream, received[at + HEAD_BYTES : end])
            if one is not None:
                ended.append(one)
            at = end
        self._received = received[at:]
        return ended

    def _take(self, kind: int, flags: int, stream: int, content: bytes) -> Ended | None:
        if kind in (SETTINGS, PING) and not flags & ACK:
            self.socket.sendall(frame(kind, ACK, 0, content if kind == PING else b""))
            return None
        if kind == GO_AWAY:  # what is open may still be answered
            self._go_away = content
            return None
        if kind == DATA:
            self._answered.add(stream)
            self._unread += len(content)
            if self._unread > LARGEST_WINDOW // 2:
                self.socket.sendall(frame(WINDOW, 0, 0, struct.pack(">I", self._unread)))
                self._unread = 0
        if kind == RESET or (kind in (DATA, HEADERS) and flags & END_STREAM):
            answered = stream in self._answered
            self._answered.discard(stream)
            return Ended(stream, answered, content if kind == HEADERS else None)
        return None


class Load:
    """A closed loop of one method and message, at most ``ROOM_BYTES`` of them in flight per connection."""

    def __init__(self, port: int, path: str, message: bytes, in_flight: Sequence[int]) -> None:
        headers = b"".join(
            (
                _POST, _HTTP, _header(":path", path), _header(":authority", "localhost"),
                _header("te", "trailers"), _header("content-type", "application/grpc"),
            )
        )  # fmt: skip
        self._call = (headers, b"\0" + len(message).to_bytes(4, "big") + message)
        self.done = self.failed = 0
        """Calls that have ended, and those of them without an answer."""
        self._connections = [Connection(("127.0.0.1", port)) for _ in in_flight]
        self._selector = selectors.DefaultSelector()
        for connection, count in zip(self._connections, in_flight, strict=True):
            connection.begin(*[self._call] * count)
            self._selector.register(connection.socket, selectors.EVENT_READ, connection)

    def run(self, seconds: float) -> None:
        """Go on for so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for key, _ in self._selector.select(0.1):
                ended = key.data.read()
                self.done += len(ended)
                self.failed += sum(not one.answered for one in ended)
                if ended:
                    key.data.begin(*[self._call] * len(ended))

    def close(self) -> None:
        """End all connections."""
        self._selector.close()
        for connection in self._connections:
            connection.socket.close()
