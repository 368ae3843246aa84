"""The client's HTTP/1.1 as bytes: addresses, request encoding and response parsing, without sockets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Final, NamedTuple
from urllib.parse import urlsplit

import httptools
import numpy as np

from clockwork_client.datatypes import Buffer
from clockwork_client.errors import Invalid

READ_BYTES: Final = 64 * 1024
DIRECT_BYTES: Final = READ_BYTES
"""Larger bodies are received directly into their final buffer."""
JOIN_BYTES: Final = 64 * 1024
"""Smaller requests are copied into one buffer, which is cheaper than writing several."""

_PORTS: Final = {"http": 80, "https": 443}
_DEFAULT_PORT: Final = 8000
_LENGTH: Final = re.compile(r"[0-9]{1,18}", re.ASCII)


class Malformed(ConnectionError):
    """The bytes received are not HTTP as this client implements it."""


@dataclass(slots=True, frozen=True)
class Address:
    """A server's address, and the headers that every request to it carries."""

    host: str
    port: int
    tls: bool
    base: str
    headers: bytes

    @classmethod
    def of(cls, url: str, api_key: str | None, agent: str) -> Address:
        """From ``http://HOST:PORT``, ``https://...`` or ``HOST:PORT``. Raises :class:`Invalid`."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            host, port = parts.hostname, parts.port
        except ValueError:
            parts, host, port = urlsplit(""), None, None
        if not host or parts.scheme not in _PORTS or parts.query or parts.fragment or parts.username:
            raise Invalid(f"parameter 'url': expected http://HOST:PORT or https://HOST:PORT, found {url!r}")
        if port is None:
            port = _PORTS[parts.scheme] if "://" in url else _DEFAULT_PORT
        name = f"[{host}]" if ":" in host else host
        lines = [f"Host: {name}:{port}", f"User-Agent: {agent}"]
        if api_key is not None:
            if not api_key.isascii() or not api_key.isprintable() or " " in api_key or not api_key:
                raise Invalid("parameter 'api_key': expected visible ASCII characters, found others or none")
            lines.append(f"Authorization: Bearer {api_key}")
        headers = "".join(f"{line}\r\n" for line in lines).encode()
        return cls(host, port, parts.scheme == "https", parts.path.rstrip("/"), headers)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def message(
        self, method: str, path: str, headers: bytes, parts: tuple[Buffer, ...]
    ) -> tuple[Buffer, ...]:
        """A whole request, as buffers to send in order; a single one if it is small."""
        size = sum(map(len, parts))
        head = b"%s %s HTTP/1.1\r\n%sContent-Length: %d\r\n%s\r\n" % (
            method.encode(), (self.base + path).encode(), self.headers, size, headers,
        )  # fmt: skip
        return (b"".join((head, *parts)),) if size <= JOIN_BYTES else (head, *parts)


class Response(NamedTuple):
    """A complete response; names in ``headers`` are in lower case."""

    status: int
    headers: dict[str, str]
    body: Buffer
    keep_alive: bool


class ResponseReader:
    """Parses the responses on one connection: read into :meth:`get_buffer`, then call :meth:`received`."""

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(READ_BYTES))
        self.expect()

    def expect(self) -> None:
        """Reset for the next response."""
        self._parser: Any = httptools.HttpResponseParser(self)
        self._headers: dict[str, str] = {}
        self._chunks: list[bytes] = []
        self._direct: memoryview | None = None  # buffer of a large body, filled up to _direct_bytes
        self._direct_bytes = 0
        self._status = 0
        self._keep_alive = False
        self._whole: Response | None = None

    def get_buffer(self) -> memoryview:
        """The buffer to receive the next bytes into."""
        return self._buffer if self._direct is None else self._direct[self._direct_bytes :]

    def received(self, nbytes: int) -> Response | None:
        """Parse ``nbytes`` received bytes; the response once it is complete. Raises :class:`Malformed`."""
        if self._direct is not None:
            self._direct_bytes += nbytes
        else:
            try:
                self._parser.feed_data(self._buffer[:nbytes])
            except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
                if self._whole is None:
                    raise Malformed(f"expected an HTTP/1.1 response, found other bytes ({error})") from None
                return self._whole._replace(keep_alive=False)
        if self._direct is not None:
            if self._direct_bytes < len(self._direct):
                return None
            return Response(self._status, self._headers, self._direct, self._keep_alive)
        return self._whole

    # Callbacks of the parser

    def on_message_begin(self) -> None:
        """A response begins. If it was not requested, the connection must not be reused."""
        if self._whole is not None:
            self._whole = self._whole._replace(keep_alive=False)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """All headers were parsed: the length of the body is known."""
        if self._whole is not None:
            return
        self._status = self._parser.get_status_code()
        self._keep_alive = self._parser.should_keep_alive()
        length = self._headers.get("content-length", "")
        if _LENGTH.fullmatch(length) and int(length) > DIRECT_BYTES:
            # Unlike a bytearray, np.empty commits no memory until it is written: the length is untrusted.
            self._direct = np.empty(int(length), np.uint8).data

    def on_body(self, content: bytes) -> None:
        """A part of the body."""
        if self._direct is None:
            self._chunks.append(content)
            return
        start = self._direct_bytes
        self._direct_bytes = start + len(content)
        self._direct[start : self._direct_bytes] = content

    def on_message_complete(self) -> None:
        """The end of a response; interim responses (1xx) are skipped."""
        if self._whole is None and self._status >= 200:
            self._whole = Response(self._status, self._headers, b"".join(self._chunks), self._keep_alive)
        self._headers = {}
