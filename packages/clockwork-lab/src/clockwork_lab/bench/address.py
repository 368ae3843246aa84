"""A server's address as a user writes it, and the TLS context to connect with."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Final, Literal
from urllib.parse import urlsplit

from msgspec import Struct

from clockwork_serve.errors import ClockworkError, ConfigError

Protocol = Literal["http", "grpc", "raw"]
PROTOCOLS: Final = ("http", "grpc", "raw")
_SCHEMES: Final = {
    "http": {"http": False, "https": True},
    "raw": {"http": False, "https": True},
    "grpc": {"http": False, "https": True, "grpc": False, "grpcs": True},
}
_PORTS: Final = {"http": 80, "https": 443}


class Unreachable(ClockworkError):
    """No server responds at the address, or it does not implement the protocol."""


@dataclass(slots=True, frozen=True)
class Address:
    """Host and port, whether to use TLS, and the prefix of every path."""

    host: str
    port: int
    tls: bool
    base: str

    @classmethod
    def of(cls, url: str, protocol: Protocol) -> Address:
        """From ``http://HOST:PORT/BASE`` or ``HOST:PORT``. Raises :class:`ConfigError`."""
        schemes = _SCHEMES[protocol]
        try:
            parts = urlsplit(url if "://" in url else f"{next(iter(schemes))}://{url}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
            parts = urlsplit("")
        if port is None:
            port = _PORTS.get(parts.scheme) if "://" in url and protocol != "grpc" else None
        if not host or not port or parts.scheme not in schemes or parts.query or parts.fragment:
            wanted = " or ".join(f"{scheme}://HOST:PORT" for scheme in schemes)
            raise ConfigError(f"url: expected {wanted}, found {url!r}; correct it")
        return cls(host, port, schemes[parts.scheme], parts.path.rstrip("/"))

    @property
    def name(self) -> str:
        """``HOST:PORT`` as headers write it."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.name}{self.base}"


class TlsFiles(Struct, frozen=True):
    """PEM files: the authorities to trust (None: the system's), and the client certificate.

    ``key`` may be in the file of ``cert``; it has no passphrase.
    """

    ca: str | None = None
    cert: str | None = None
    key: str | None = None


def tls_context(files: TlsFiles, *, http2: bool) -> ssl.SSLContext:
    """The context for TLS connections. Raises :class:`ConfigError`."""
    try:
        context = ssl.create_default_context(cafile=files.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"ca: expected a file of certificates in PEM, found {files.ca} ({error})") from None
    if files.cert is not None:
        try:
            context.load_cert_chain(files.cert, files.key, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            found = f"{files.cert} and {files.key or 'no --key'} ({error})"
            raise ConfigError(
                f"cert: expected a certificate and its key in PEM, without a passphrase, found {found}"
            ) from None
    context.set_alpn_protocols(["h2"] if http2 else ["http/1.1"])
    return context
