"""A sender's HTTP/1.1: one request in flight per connection, responses parsed no further than needed.

Of a successful response only the status and Content-Length are read. httptools, which costs more, parses only
bodies in chunks and those that end with their connection.
"""

from __future__ import annotations

import errno
import re
from time import monotonic_ns
from typing import Any, Final

import httptools

from clockwork_lab.bench.messages import Message
from clockwork_lab.bench.records import ABANDONED, ANSWERED, Kind
from clockwork_lab.bench.sender import LoadConnection, Sender

JOINED_BYTES: Final = 16 << 10
"""Requests up to this are prepared whole; for longer ones, models of equal inputs share the body."""
HEAD_BYTES_MAX: Final = 1 << 16
ERROR_BYTES_MAX: Final = 1 << 16  # how much of an error response's body is kept, to read its reason
_LENGTH: Final = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r\n", re.IGNORECASE)
_SPECIAL: Final = re.compile(rb"\r\n(connection:[ \t]*close|transfer-encoding:)", re.IGNORECASE)
_LATER: Final = (BlockingIOError,)


class PreparedRequests:
    """All messages as bytes to send."""

    def __init__(self, messages: list[Message], bodies: list[bytes]) -> None:
        self.whole: list[bytes | None] = []
        self.halves: list[tuple[bytes, bytes]] = []
        for message in messages:
            body = bodies[message.body]
            short = len(message.head) + len(body) <= JOINED_BYTES
            self.whole.append(message.head + body if short else None)
            self.halves.append((b"", b"") if short else (message.head, body))


class HttpLoadConnection(LoadConnection):
    """One HTTP connection. ``row`` is the request in flight, -1 if none."""

    __slots__ = ("_error", "_head", "_keep", "_left", "_nbytes", "_parser", "_received", "_status", "row")

    def __init__(self, run: Sender) -> None:
        self.row = -1
        self._received = b""
        self._left = 0
        self._nbytes = 0
        self._status = 0
        self._head = b""
        self._error: bytes | None = None
        self._parser: _Chunks | None = None
        self._keep = True
        super().__init__(run)

    def send(self, row: int, message: int) -> None:
        """Send one request."""
        run = self.run
        prepared: PreparedRequests = run.prepared
        self.row = row
        data = prepared.whole[message]
        run.sent[row] = monotonic_ns() - run.start_ns
        if data is not None:
            self.write(data)
            return
        head, body = prepared.halves[message]
        if run.tls is not None:
            self.write(head + body)
            return
        try:
            sent = self.sock.sendmsg((head, body))
        except _LATER:
            sent = 0
        except OSError as error:
            self.lost(errno.errorcode.get(error.errno or 0, "error"))
            return
        if sent < len(head):
            self.keep(memoryview(head + body)[sent:])
        elif sent < len(head) + len(body):
            self.keep(memoryview(body)[sent - len(head) :])

    def written(self) -> None:
        """The request was written completely."""
        if self.row < 0:  # its response was complete before it was fully sent
            self.run.free(self)

    def data_received(self, data: bytes) -> None:
        """Parse more of the response."""
        row = self.row
        run = self.run
        if row < 0:
            run.unexpected_response(len(data))
            self.close()
            return
        now_ns = monotonic_ns() - run.start_ns
        if self._left:
            self._nbytes += len(data)
            if self._error is not None and len(self._error) < ERROR_BYTES_MAX:
                self._error += data
            self._left -= len(data)
            if self._left <= 0:
                self._on_complete(now_ns, -self._left)
            return
        if self._parser is not None:
            self._nbytes += len(data)
            self._feed(data, now_ns)
            return
        if self._received:
            data = self._received + data
        else:
            run.first[row] = now_ns
        end = data.find(b"\r\n\r\n")
        if end >= 0:
            self._received = b""
            self._on_head(data, end, now_ns)
        elif len(data) > HEAD_BYTES_MAX or data[:5] != b"HTTP/"[: len(data)]:
            self._broken("not HTTP", now_ns)
        else:
            self._received = data

    def _on_head(self, data: bytes, end: int, now_ns: int) -> None:
        """The head is complete."""
        status = int(data[9:12]) if data[:7] == b"HTTP/1." and data[9:12].isdigit() else 0
        if status < 200:
            if status < 100:
                self._broken("not HTTP", now_ns)
            elif len(data) > end + 4:
                self.data_received(data[end + 4 :])
            return
        body_at = end + 4
        self._status, self._nbytes = status, len(data)
        found = _LENGTH.search(data, 0, body_at)
        special = _SPECIAL.search(data, 0, body_at)
        good = status < 300
        if special is not None or found is None or data[7:8] == b"0":
            self._keep = special is None and data[7:8] != b"0"
            if found is None or (special is not None and special[1][:1] in b"tT"):
                self._head = b"" if good else data[:body_at]
                self._parser = _Chunks(keep_body=not good)
                self._feed(data, now_ns)
                return
        length = int(found[1])
        if not good:
            self._head, self._error = data[:body_at], data[body_at:]
        left = length - (len(data) - body_at)
        if left > 0:
            self._left = left
        else:
            self._on_complete(now_ns, -left)

    def _feed(self, data: bytes, now_ns: int) -> None:
        parser = self._parser
        assert parser is not None
        try:
            parser.feed(data)
        except httptools.HttpParserError:
            self._broken("not HTTP", now_ns)
            return
        if parser.whole:
            self._error = parser.body
            self._keep = parser.should_keep_alive()
            self._on_complete(now_ns, 0)

    def _on_complete(self, now_ns: int, beyond: int) -> None:
        """The response is complete; ``beyond`` further bytes were received that were not requested."""
        run, row = self.run, self.row
        self.row, self._left, self._parser = -1, 0, None
        keep = self._keep and not beyond
        self._keep = True
        if beyond:
            run.unexpected_response(beyond)
        if self._status < 300:  # said here, for most responses are: a call costs
            self._error = None
            run.ended(row, ANSWERED, now_ns, self._nbytes, None)
        else:
            self._end(row, now_ns, self._error or b"")
        if not keep:
            self.close()
        elif self.rest is None:
            run.free(self)

    def _end(self, row: int, now_ns: int, error: bytes) -> None:
        code, wait_ns = ANSWERED, None
        if self._status >= 300:
            code, wait_ns = self.run.ends.http(self._status, self._head, error)
        self._error, self._head = None, b""
        self.run.ended(row, code, now_ns, self._nbytes, wait_ns)

    def _broken(self, why: str, now_ns: int) -> None:
        row, self.row = self.row, -1
        self.close()
        self.run.ended(row, self.run.ends.code(Kind.BROKEN, why), now_ns, 0, None)

    def lost(self, why: str) -> None:
        """The connection was closed: there will be no response."""
        row, self.row = self.row, -1
        parser, run = self._parser, self.run
        now_ns = monotonic_ns() - run.start_ns
        self.close()
        if row < 0:
            return
        if parser is not None and not parser.has_length and why == "closed":
            self._end(row, now_ns, parser.body)
            return
        run.ended(row, run.ends.code(Kind.RESET, why), now_ns, 0, None)

    def abandon(self, row: int) -> None:
        """Close the connection, the only way of HTTP/1.1 to cancel a request."""
        self.row = -1
        self.close()
        self.run.ended(row, ABANDONED, monotonic_ns() - self.run.start_ns, 0, None)


class _Chunks:
    """httptools' parser for responses that do not begin with their length."""

    def __init__(self, *, keep_body: bool) -> None:
        parser: Any = httptools.HttpResponseParser(self)
        self.feed, self.should_keep_alive = parser.feed_data, parser.should_keep_alive
        self._keep_body = keep_body
        self.has_length = False
        self.body = b""
        self.whole = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self.has_length |= name.lower() in (b"transfer-encoding", b"content-length")

    def on_body(self, content: bytes) -> None:
        """A part of the body."""
        if self._keep_body and len(self.body) < ERROR_BYTES_MAX:
            self.body += content

    def on_message_complete(self) -> None:
        """The end of the response."""
        self.whole = True
