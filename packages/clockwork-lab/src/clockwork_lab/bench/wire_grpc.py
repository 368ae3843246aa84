"""A sender's gRPC: many calls per connection, as HTTP/2 frames that are mostly prepared before the run.

grpcio's own clients cost several times the CPU of what is measured with this. Headers of responses are
skipped, trailers are decoded once for each distinct block.
"""

from __future__ import annotations

import struct
from collections import deque
from time import monotonic_ns
from typing import ClassVar, Final

from clockwork_lab.bench.messages import Message, Undecodable, decode
from clockwork_lab.bench.records import ABANDONED, Kind
from clockwork_lab.bench.sender import LoadConnection, Sender

_DATA, _HEADERS, _PRIORITY, _RESET, _SETTINGS, _PUSH, _PING, _GO_AWAY, _WINDOW, _CONTINUATION = range(10)
_END_STREAM, _END_HEADERS, _PADDED, _WITH_PRIORITY, _ACK = 1, 4, 8, 32, 1
_TABLE_SIZE, _PUSHES, _STREAMS, _INITIAL_WINDOW, _FRAME_SIZE = 1, 2, 3, 4, 5
_HEAD_BYTES: Final = 9
_LARGEST_WINDOW: Final = 2**31 - 1
_FIRST_WINDOW: Final = 65_535
_FIRST_FRAME: Final = 16_384
_REFUSED: Final = 7
_CANCEL: Final = 8
_ERRORS: Final = (
    "NO_ERROR", "PROTOCOL_ERROR", "INTERNAL_ERROR", "FLOW_CONTROL_ERROR", "SETTINGS_TIMEOUT",
    "STREAM_CLOSED", "FRAME_SIZE_ERROR", "REFUSED_STREAM", "CANCEL", "COMPRESSION_ERROR", "CONNECT_ERROR",
    "ENHANCE_YOUR_CALM", "INADEQUATE_SECURITY", "HTTP_1_1_REQUIRED",
)  # fmt: skip
_BLOCK_BYTES_MAX: Final = 1 << 16
FIRST_STREAMS: Final = 100  # concurrent streams on one connection before the server's settings arrive
STREAMS_MAX: Final = 1000
ENDS_KNOWN_MAX: Final = 1000


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "big") + struct.pack(">BBI", kind, flags, stream) + content


class NotHttp2(ValueError):
    """The peer's bytes are not HTTP/2."""


_PREFACE: Final = (
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    + _frame(
        _SETTINGS, 0, 0, struct.pack(">HIHIHI", _TABLE_SIZE, 0, _PUSHES, 0, _INITIAL_WINDOW, _LARGEST_WINDOW)
    )
    + _frame(_WINDOW, 0, 0, struct.pack(">I", _LARGEST_WINDOW - _FIRST_WINDOW))
)


class PreparedCalls:
    """All messages: the HEADERS frame without its stream id, and the data."""

    def __init__(self, messages: list[Message], bodies: list[bytes]) -> None:
        self.heads: list[bytes] = []
        self.data_heads: list[bytes] = []
        self.data: list[tuple[bytes, bytes]] = []
        self.sizes: list[int] = []
        for message in messages:
            body = bodies[message.body]
            size = len(message.lead) + len(body)
            self.heads.append(len(message.head).to_bytes(3, "big") + bytes((_HEADERS, _END_HEADERS)))
            self.data_heads.append(min(size, 0xFFFFFF).to_bytes(3, "big") + bytes((_DATA, _END_STREAM)))
            self.data.append((message.lead, body))
            self.sizes.append(size)
        self.blocks = [message.head for message in messages]


class GrpcLoadConnection(LoadConnection):
    """One connection with many concurrent calls."""

    __slots__ = (
        "_at_most", "_block", "_block_ends", "_frame_bytes", "_goaway", "_held", "_initial_window",
        "_listed", "_next", "_out", "_received", "_rows", "_streams", "_unread", "_window", "_windows",
    )  # fmt: skip
    http2: ClassVar[bool] = True

    def __init__(self, run: Sender) -> None:
        self._next = 1
        self._rows: dict[int, int] = {}  # by stream
        self._streams: dict[int, int] = {}  # stream by row
        self._received = b""
        self._out: list[bytes] = []  # frames to write in this iteration
        self._held: deque[tuple[int, memoryview]] = deque()  # data that waits for flow control
        self._windows: dict[int, int] = {}  # windows of streams in _held
        self._window = self._initial_window = _FIRST_WINDOW
        self._frame_bytes = _FIRST_FRAME
        self._at_most = FIRST_STREAMS
        self._unread = 0
        self._goaway = self._listed = False
        self._block = b""
        self._block_ends = False
        super().__init__(run)

    def connected(self) -> None:
        """Send the preface. The number of streams is known only from the server's settings."""
        self.write(_PREFACE)

    def send(self, row: int, message: int) -> None:
        """Start a call, as frames of this iteration."""
        run = self.run
        prepared: PreparedCalls = run.prepared
        stream = self._next
        self._next = stream + 2
        self._rows[stream] = row
        self._streams[row] = stream
        number = stream.to_bytes(4, "big")
        size = prepared.sizes[message]
        lead, body = prepared.data[message]
        if not self._out:
            run.dirty.append(self)
        run.sent[row] = monotonic_ns() - run.start_ns
        if size <= self._frame_bytes and size <= self._window and size <= self._initial_window:
            self._window -= size
            self._out += (
                prepared.heads[message], number, prepared.blocks[message],
                prepared.data_heads[message], number, lead, body,
            )  # fmt: skip
        else:
            self._out += (prepared.heads[message], number, prepared.blocks[message])
            self._windows[stream] = self._initial_window
            self._held.append((stream, memoryview(lead + body)))
            self._send_held()
        self._list_idle()

    def _list_idle(self) -> None:
        """Join the connections that can accept a call, if this one can."""
        self._listed = self._has_room()
        if self._listed:
            self.run.idle.append(self)

    def _has_room(self) -> bool:
        """Whether a call could be sent at once, within the peer's flow control."""
        return len(self._rows) < self._at_most and self.rest is None and not self._held and not self._goaway

    def _list_if_room(self) -> None:
        if not self._listed and self.is_established and self._has_room():
            self._listed = True
            self.run.free(self)

    def flush(self) -> None:
        """Write the frames of this iteration together."""
        if self._out and self.rest is None and not self.dead:
            frames, self._out = self._out, []
            self.write(b"".join(frames))

    def written(self) -> None:
        """All of ``rest`` was written."""
        self.flush()
        self._list_if_room()

    def _queue_frame(self, frame: bytes) -> None:
        if not self._out:
            self.run.dirty.append(self)
        self._out.append(frame)

    def _send_held(self) -> None:
        """Send held data as far as the windows allow."""
        held = self._held
        for _ in range(len(held)):
            stream, data = held.popleft()
            if stream not in self._rows:
                self._windows.pop(stream, None)
                continue
            while data and self._window > 0 and self._windows[stream] > 0:
                size = min(len(data), self._frame_bytes, self._window, self._windows[stream])
                last = _END_STREAM if size == len(data) else 0
                self._queue_frame(_frame(_DATA, last, stream, bytes(data[:size])))
                data = data[size:]
                self._window -= size
                self._windows[stream] -= size
            if data:
                held.append((stream, data))
            else:
                del self._windows[stream]

    def data_received(self, data: bytes) -> None:
        """Parse complete frames."""
        received = self._received + data if self._received else data
        now_ns = monotonic_ns() - self.run.start_ns
        at, size = 0, len(received)
        while size - at >= _HEAD_BYTES and not self.dead:
            length = int.from_bytes(received[at : at + 3], "big")
            end = at + _HEAD_BYTES + length
            if size < end and length <= _FIRST_FRAME:
                break
            kind, flags, stream = struct.unpack_from(">BBI", received, at + 3)
            try:
                _check(kind, flags, length, received[at + _HEAD_BYTES : end])
                self._frame(kind, flags, stream & _LARGEST_WINDOW, received[at + _HEAD_BYTES : end], now_ns)
            except NotHttp2 as error:
                self.lost(str(error))
                return
            at = end
        self._received = received[at:] if at < size else b""

    def _frame(self, kind: int, flags: int, stream: int, content: bytes, now_ns: int) -> None:
        if kind == _DATA:
            self._on_data(flags, stream, len(content), now_ns)
        elif kind == _HEADERS:
            if flags & _PADDED:
                content = content[1 : len(content) - content[0]]
            if flags & _WITH_PRIORITY:
                content = content[5:]
            self._on_headers(flags, stream, content, ended=bool(flags & _END_STREAM), now_ns=now_ns)
        elif kind == _CONTINUATION:
            block, self._block = self._block + content, b""
            if len(block) > _BLOCK_BYTES_MAX:
                raise NotHttp2("headers of HTTP/2 without an end")
            self._on_headers(flags, stream, block, ended=self._block_ends, now_ns=now_ns)
        elif kind == _RESET:
            self._on_reset(stream, int.from_bytes(content, "big"), now_ns)
        elif kind == _SETTINGS:
            if not flags & _ACK:
                self._on_settings(content)
        elif kind == _PING:
            if not flags & _ACK:
                self._queue_frame(_frame(_PING, _ACK, 0, content))
        elif kind == _WINDOW:
            self._on_window_update(stream, int.from_bytes(content, "big") & _LARGEST_WINDOW)
        elif kind == _GO_AWAY:
            self._on_goaway(content, now_ns)

    def _on_data(self, flags: int, stream: int, size: int, now_ns: int) -> None:
        row = self._rows.get(stream)
        if row is not None:
            if not self.run.first[row]:
                self.run.first[row] = now_ns
            self.run.nbytes[row] += size
            if flags & _END_STREAM:
                self._over(stream, self.run.ends.grpc({})[0], now_ns)
        self._unread += size
        if self._unread > _LARGEST_WINDOW // 2:
            self._queue_frame(_frame(_WINDOW, 0, 0, struct.pack(">I", self._unread)))
            self._unread = 0

    def _on_headers(self, flags: int, stream: int, block: bytes, *, ended: bool, now_ns: int) -> None:
        if not flags & _END_HEADERS:
            self._block, self._block_ends = block, ended
            return
        row = self._rows.get(stream)
        if row is None:
            return
        if not self.run.first[row]:
            self.run.first[row] = now_ns
        if not ended:
            return
        known = self.run.trailers.get(block)
        if known is None:
            try:
                known = self.run.ends.grpc(decode(block))
            except Undecodable:
                known = self.run.ends.code(Kind.BROKEN, "headers of HTTP/2 that cannot be read"), None
            if len(self.run.trailers) >= ENDS_KNOWN_MAX:
                self.run.trailers.clear()
            self.run.trailers[block] = known
        self._over(stream, known[0], now_ns, known[1])

    def _on_reset(self, stream: int, code: int, now_ns: int) -> None:
        """A call ended; one that exceeded the server's stream limit is queued again."""
        row = self._rows.get(stream)
        if code == _REFUSED and row is not None and self.run.may_retry(row):
            del self._rows[stream], self._streams[row]
            if not self._rows:
                self._list_if_room()
            self.run.requeue(row)
            return
        self._over(stream, self.run.ends.code(Kind.RESET, f"RST_STREAM {_error(code)}"), now_ns)

    def _on_settings(self, content: bytes) -> None:
        for at in range(0, len(content) - 5, 6):
            name, value = struct.unpack_from(">HI", content, at)
            if name == _STREAMS:
                self._at_most = min(value, STREAMS_MAX)
            elif name == _INITIAL_WINDOW:
                if value > _LARGEST_WINDOW:
                    raise NotHttp2("a window of HTTP/2 that cannot be")
                for stream in self._windows:
                    self._windows[stream] += value - self._initial_window
                self._initial_window = value
            elif name == _FRAME_SIZE:
                if value < _FIRST_FRAME:
                    raise NotHttp2("a frame size of HTTP/2 that cannot be")
                self._frame_bytes = value
        self._queue_frame(_frame(_SETTINGS, _ACK, 0, b""))
        self._send_held()
        if not self.is_established:
            self._listed = True
            self.established()
        else:
            self._list_if_room()

    def _on_window_update(self, stream: int, more: int) -> None:
        if not stream:
            self._window += more
        elif stream in self._windows:
            self._windows[stream] += more
        if self._held:
            self._send_held()
            self._list_if_room()

    def _on_goaway(self, content: bytes, now_ns: int) -> None:
        """No new calls; those that the server will not process end now."""
        last, code = struct.unpack_from(">II", content)
        self._goaway = True
        end = self.run.ends.code(Kind.RESET, f"GOAWAY {_error(code)}")
        for stream in [each for each in self._rows if each > last & _LARGEST_WINDOW]:
            self._over(stream, end, now_ns)
        self._close_if_done()

    def _close_if_done(self) -> None:
        if self._goaway and not self._rows:
            self.close()

    def _over(self, stream: int, code: int, now_ns: int, wait_ns: int | None = None) -> None:
        row = self._rows.pop(stream, None)
        if row is None:
            return
        del self._streams[row]
        self.run.ended(row, code, now_ns, self.run.nbytes[row], wait_ns)
        self._list_if_room()
        self._close_if_done()

    def lost(self, why: str) -> None:
        """All open calls end without a response."""
        rows, self._rows = list(self._rows.values()), {}
        now_ns = monotonic_ns() - self.run.start_ns
        self.close()
        if not self.is_established:
            self.run.refused(f"{why} before any HTTP/2 was received")
        code = self.run.ends.code(Kind.RESET, why)
        for row in rows:
            self.run.ended(row, code, now_ns, 0, None)

    def abandon(self, row: int) -> None:
        """Cancel a call."""
        stream = self._streams.get(row)
        if stream is not None:
            self._queue_frame(_frame(_RESET, 0, stream, _CANCEL.to_bytes(4, "big")))
            self._over(stream, ABANDONED, monotonic_ns() - self.run.start_ns)


def _check(kind: int, flags: int, length: int, content: bytes) -> None:
    """Raise :class:`NotHttp2` for a frame that is larger or shorter than the protocol allows."""
    if length > _FIRST_FRAME:
        raise NotHttp2("a frame of HTTP/2 larger than this side accepts")
    if (kind in (_RESET, _WINDOW) and length != 4) or (kind == _GO_AWAY and length < 8):
        raise NotHttp2("a frame of HTTP/2 that is cut")
    if kind == _HEADERS and flags & _PADDED and (not content or content[0] >= length):
        raise NotHttp2("a frame of HTTP/2 with more padding than content")


def _error(code: int) -> str:
    return _ERRORS[code] if code < len(_ERRORS) else str(code)
