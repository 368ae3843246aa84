"""The live page over HTTP: its files, its stream, what it asks for. For the observer and ``clockwork live``.

It answers GET alone, and sends nothing that a browser would run but its own files. A reader that does not
read costs one frame: while that is unsent, no other is made.
"""

from __future__ import annotations

import asyncio
import hmac
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import parse_qs, unquote

import httptools
import msgspec

import clockwork_serve.telemetry
from clockwork_serve.errors import ClockworkError
from clockwork_serve.serve.http.responses import HttpResponse, error_response, internal_error_response
from clockwork_serve.telemetry.live import LiveView, ReaderCursor
from clockwork_serve.units import KIB

FILES: Final = Path(clockwork_serve.telemetry.__file__).parent / "page"
TYPES: Final = {
    ".html": b"text/html; charset=utf-8", ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8", ".txt": b"text/plain; charset=utf-8",
}  # fmt: skip
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What the page may do: nothing but load its own files and ask where it came from."""
SAFE_HEADERS: Final = (
    f"Content-Security-Policy: {POLICY}\r\nX-Content-Type-Options: nosniff\r\n"
    "Referrer-Policy: no-referrer\r\nCross-Origin-Resource-Policy: same-origin\r\nCache-Control: no-store\r\n"
).encode()
TENANT_HEADER: Final = b"clockwork-tenant"
"""Says, from gateways alone, that the reader may see this tenant's requests and nothing else."""
FRAME_S: Final = 0.2
GAP_FRAMES: Final = 25
"""A reader that missed so many is told that there is a gap, and asks for what it wants to see."""
STALLED_FRAMES: Final = 300  # a reader that missed so many is gone
HEAD_BYTES: Final = 16 * KIB
PIXELS_MOST: Final = 10_000
CONNECTIONS: Final = 256
COOKIE: Final = "clockwork-live"
NOT_EXPLAINED: Final = "explanations are not available here"

Explain = Callable[[str, str | None, Sequence[str]], Awaitable[Mapping[str, Any] | None]]
"""By request id, the tenant that the reader is, if he may not see all, and changes that he asks for: a
``sentence`` and more ``lines``.

It gives None if there is no such request, or he may not see it, and raises ClockworkError for a bad change.
"""
_encode: Final = msgspec.json.Encoder().encode


class Query:
    """The parameters of a request for the page. Raises ValueError, with a message for who asks."""

    def __init__(self, text: str) -> None:
        self._found = parse_qs(text, max_num_fields=32)

    def text(self, name: str) -> str | None:
        """A parameter, or None."""
        found = self._found.get(name)
        return found[-1] if found else None

    def texts(self, name: str) -> list[str]:
        """A parameter as often as it is given."""
        return self._found.get(name, [])

    def number(self, name: str, usual: int, least: int = 0, most: int = 1 << 53) -> int:
        """A whole number between two others."""
        text = self.text(name)
        if text is None:
            return usual
        digits = text.removeprefix("-")
        if not (digits.isascii() and digits.isdigit() and len(digits) < 17 and least <= int(text) <= most):
            raise ValueError(f"{name}: expected a whole number from {least} to {most}, found {text[:40]!r}")
        return int(text)


class LivePage:
    """What the page asks for, without a socket. ``tenant``: the only one whose requests a reader may see."""

    def __init__(self, view: LiveView, explain: Explain | None = None) -> None:
        self.view = view
        self._explain = explain
        self._files = {
            path.name: HttpResponse(200, (path.read_bytes(),), TYPES[path.suffix], SAFE_HEADERS)
            for path in sorted(FILES.iterdir())
            if path.suffix in TYPES
        }
        self._routes: dict[str, Callable[[Query, str | None], Any]] = {
            "window": self._window, "requests": self._requests, "panels": self._panels,
            "explain": self._explanation,
        }  # fmt: skip

    def add(self, name: str, answer: Callable[[], Any]) -> None:
        """Answer ``/live/NAME`` with an object of JSON, for who may see all."""
        self._routes[name] = lambda query, tenant: answer()

    def answer(
        self, path: str, query: str, tenant: str | None = None
    ) -> HttpResponse | Awaitable[HttpResponse]:
        """The answer to anything but the stream; an explanation is waited for."""
        name = "index.html" if path == "/" else path.removeprefix("/live/")
        if name in self._files and (path == "/" or path.startswith("/live/")):
            return self._files[name]
        ask = self._routes.get(name) if path.startswith("/live/") else None
        if ask is None:
            return refusal(404, "Not Found")
        if tenant is not None and name not in ("requests", "explain"):
            return refusal(403, "this key may see the requests of its tenant, and nothing else")
        try:
            found = ask(Query(query), tenant)
        except ValueError as error:
            return refusal(400, str(error))
        return found if isinstance(found, HttpResponse | Awaitable) else _json(found)

    def _window(self, query: Query, tenant: str | None) -> Any:
        from_us, to_us = self._stretch(query)
        known = query.number("models", 0), query.number("lanes", 0)
        return self.view.window(from_us, to_us, query.number("pixels", 1000, 1, PIXELS_MOST), known)

    def _requests(self, query: Query, tenant: str | None) -> Any:
        from_us, to_us = self._stretch(query)
        only = query.text("only") or ""
        if only not in ("", "good", "bad"):
            raise ValueError(f"only: expected good or bad, found {only[:40]!r}")
        return self.view.requests(
            from_us, to_us, offset=query.number("offset", 0), limit=query.number("limit", 50, 1, 200),
            only=only, model=query.text("model"),
            tenant=tenant if tenant is not None else query.text("tenant"),
        )  # fmt: skip

    def _panels(self, query: Query, tenant: str | None) -> Any:
        return self.view.panels(*self._stretch(query))

    def _explanation(self, query: Query, tenant: str | None) -> Any:
        request_id = query.text("id")
        if not request_id:
            raise ValueError("id: expected a request's id, found none")
        known = self.view.find(request_id)
        if known is not None and tenant is not None and known.tenant != tenant:
            return refusal(404, "there is no such request")
        if self._explain is None:
            return refusal(501, NOT_EXPLAINED)
        return self._explained(self._explain(request_id, tenant, query.texts("if")))

    async def _explained(self, explaining: Awaitable[Mapping[str, Any] | None]) -> HttpResponse:
        try:
            found = await explaining
        except ClockworkError as error:
            return refusal(400, str(error))
        except Exception:  # noqa: BLE001 - what explains may fail in any way, and the page goes on
            return internal_error_response()
        return refusal(404, "there is no such request") if found is None else _json(found)

    def _stretch(self, query: Query) -> tuple[int, int]:
        now_us = self.view.now_us
        from_us = query.number("from", max(0, now_us - 30_000_000), -(1 << 53))
        to_us = query.number("to", max(now_us, from_us), -(1 << 53))
        if to_us < from_us:
            raise ValueError(f"to: expected no less than from, found {to_us}")
        return from_us, to_us


def refusal(status: int, message: str) -> HttpResponse:
    """An answer that is none."""
    return msgspec.structs.replace(error_response(status, message), headers=SAFE_HEADERS)


def _json(found: Any) -> HttpResponse:
    return HttpResponse(200, (_encode(found),), headers=SAFE_HEADERS)


class PageConnection(asyncio.Protocol):
    """One reader's connection: answers one request after the other, or streams until it ends."""

    def __init__(self, server: PageServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._timer: asyncio.TimerHandle | None = None
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._read_bytes = self._missed = 0
        self._waiting: asyncio.Future[HttpResponse] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, if there is room."""
        self._transport = cast("asyncio.Transport", transport)
        self._server.connections.add(self)
        if len(self._server.connections) > CONNECTIONS:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """The reader is gone."""
        self._transport = None
        self._server.connections.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._waiting is not None:
            self._waiting.cancel()

    def end(self) -> None:
        """Close it."""
        if self._transport is not None:
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Parse; what comes while the stream runs, or an explanation is made, is dropped."""
        self._read_bytes += len(data)
        if self._timer is not None or self._waiting is not None or self._transport is None:
            return
        try:
            if self._read_bytes > HEAD_BYTES:
                self._write(refusal(431, "header: expected less"), keep=False)
                return
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._write(refusal(400, "malformed HTTP request"), keep=False)

    def on_message_begin(self) -> None:
        """Called by the parser."""
        self._url, self._headers = b"", {}

    def on_url(self, url: bytes) -> None:
        """Called by the parser."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        self._headers[name.lower()] = value

    def on_message_complete(self) -> None:
        """Answer."""
        if self._waiting is not None:
            return
        self._read_bytes = 0
        keep = bool(self._parser.should_keep_alive())
        try:
            found = self._found()
        except Exception:  # noqa: BLE001 - a bug that one request triggers must not end all others
            found = internal_error_response()
        if isinstance(found, HttpResponse):
            self._write(found, keep=keep)
        elif isinstance(found, Awaitable):
            self._waiting = asyncio.ensure_future(found)
            self._waiting.add_done_callback(self._waited)
        elif self._transport is not None:
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n%sConnection: close\r\n\r\n"
            self._transport.write(head % SAFE_HEADERS)
            self._frame(ReaderCursor(), found)

    def _waited(self, waiting: asyncio.Future[HttpResponse]) -> None:
        self._waiting = None
        if not waiting.cancelled():
            self._write(waiting.result(), keep=False)

    def _found(self) -> HttpResponse | Awaitable[HttpResponse] | int:
        """The answer, or how many microseconds a pixel of the stream has."""
        if self._parser.get_method() not in (b"GET", b"HEAD"):
            return refusal(405, "Method Not Allowed")
        try:
            url = httptools.parse_url(self._url)
        except httptools.HttpParserInvalidURLError:
            return refusal(400, "malformed URL")
        path = unquote((url.path or b"/").decode("latin-1"))
        query = (url.query or b"").decode("latin-1")
        if (refused := self._server.refused(path, query, self._headers)) is not None:
            return refused
        tenant = self._headers.get(TENANT_HEADER)
        whose = None if tenant is None else tenant.decode("latin-1")
        if path != "/live/stream" or whose is not None:
            return self._server.page.answer(path, query, whose)
        try:
            return Query(query).number("pixel", 10_000, 1, 1 << 40)
        except ValueError as error:
            return refusal(400, str(error))

    def _write(self, response: HttpResponse, *, keep: bool) -> None:
        if self._transport is None:
            return
        head = response.head(response.body_bytes, b"" if keep else b"Connection: close\r\n")
        body = () if self._parser.get_method() == b"HEAD" else response.parts
        self._transport.writelines([head, *map(bytes, body)])
        if not keep:
            self._transport.close()

    def _frame(self, reader: ReaderCursor, pixel_us: int) -> None:
        """Send what is new, and so on; nothing while the frame before is unsent."""
        transport = self._transport
        if transport is None:
            return
        if not transport.get_write_buffer_size():
            if self._missed >= GAP_FRAMES:
                known, reader = reader.known, ReaderCursor()
                reader.known = known
            found = self._server.page.view.frame(reader, pixel_us)
            if self._missed >= GAP_FRAMES:
                found["gap"] = True
            self._missed = 0
            transport.write(b"data: %s\n\n" % _encode(found))
        else:
            self._missed += 1
            if self._missed > STALLED_FRAMES:
                transport.abort()
                return
        self._timer = asyncio.get_running_loop().call_later(FRAME_S, self._frame, reader, pixel_us)


class PageServer:
    """Listens for readers of a page: of the observer on a unix socket, or on this machine's own address.

    With a ``key``, a reader has to name it once: ``/?key=KEY``; its browser keeps it as a cookie.
    """

    def __init__(self, page: LivePage, *, key: str = "") -> None:
        self.page = page
        self.connections: set[PageConnection] = set()
        self._key = key
        self._server: asyncio.AbstractServer | None = None
        self._hosts: frozenset[bytes] = frozenset()

    def connection(self) -> PageConnection:
        """A reader's connection, for who listens: it may have been another protocol's before."""
        return PageConnection(self)

    async def listen_unix(self, path: Path) -> None:
        """Listen on a socket that is its owner's alone, since its folder is. Raises OSError."""
        self._server = await asyncio.get_running_loop().create_unix_server(self.connection, str(path))
        os.chmod(path, 0o600)  # noqa: PTH101 - a moment, once

    async def listen(self, port: int) -> int:
        """Listen on 127.0.0.1; the port. Raises OSError."""
        server = await asyncio.get_running_loop().create_server(self.connection, "127.0.0.1", port)
        self._server = server
        found = int(server.sockets[0].getsockname()[1])
        # Another name may be one of another site's that was made to lead here.
        self._hosts = frozenset(f"{name}:{found}".encode() for name in ("127.0.0.1", "localhost"))
        return found

    def refused(self, path: str, query: str, headers: Mapping[bytes, bytes]) -> HttpResponse | None:
        """The answer to who may not ask, or has to be told to remember the key."""
        if self._hosts and headers.get(b"host", b"") not in self._hosts:
            return refusal(403, "header 'Host': expected this machine's own address, found another name")
        if not self._key:
            return None
        named = parse_qs(query).get("key", [""])[-1] if path == "/" else ""
        if hmac.compare_digest(named.encode(), self._key.encode()):
            remember = f"{COOKIE}={self._key}; Path=/; HttpOnly; SameSite=Strict"
            headers_there = b"Location: /\r\nSet-Cookie: %s\r\n%s" % (remember.encode(), SAFE_HEADERS)
            return HttpResponse(HTTPStatus.SEE_OTHER, (), TYPES[".txt"], headers_there)
        given = [one.strip() for one in headers.get(b"cookie", b"").decode("latin-1").split(";")]
        if any(hmac.compare_digest(one.encode(), f"{COOKIE}={self._key}".encode()) for one in given):
            return None
        return refusal(401, "expected the address that was printed, with its key")

    def close(self) -> None:
        """Stop listening, and end all streams."""
        if self._server is not None:
            self._server.close()
        for connection in tuple(self.connections):
            connection.end()
