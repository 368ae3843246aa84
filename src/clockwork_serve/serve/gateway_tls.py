"""TLS for the gateways' ports: certificate files, checked, as what HTTP and gRPC want. It opens no socket."""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from clockwork_serve.serve import pem
from clockwork_serve.serve.gateway_watch import Watched

_READ_BY_ALL: Final = 0o004
_log = logging.getLogger(__name__)


class TlsFiles(Struct, frozen=True, kw_only=True):
    """Paths of PEM files: the certificate and what vouches for it, its key, and who vouches for clients.

    Without ``client_ca`` clients need no certificate.
    """

    certificate: str
    key: str
    client_ca: str = ""


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """What HTTP wants: TLS 1.2 or later. Raises :class:`ConfigError` naming the setting."""
    for setting, path in _named(files):
        pem.read(setting, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    pem.load_chain(context, "tls", files.certificate, files.key)
    if files.client_ca:
        pem.load_authorities(context, "tls_client_ca", files.client_ca)
    return context


class Tls:
    """TLS as new connections get it: renewed files serve from the next handshake on."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises :class:`ConfigError` naming the setting."""
        self._files = files
        self._watched = Watched([path for _, path in _named(files)], lambda: _Content.of(files))
        self._for_grpc = self._watched.content

    @property
    def context(self) -> ssl.SSLContext:
        """What HTTP wants now."""
        return self._watched.content.context

    def grpc_credentials(self) -> Any:
        """What gRPC wants; it asks again at each handshake, and speaks TLS 1.2 or later by itself."""
        import grpc

        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._for_grpc), self._renewed, bool(self._files.client_ca)
        )

    def refresh(self) -> None:
        """Read the files again if they changed."""
        if self._watched.refresh():
            _log.info("tls_certificate: read %s again", self._files.certificate)

    def _renewed(self) -> Any:
        # Called by a thread of gRPC's own, in which both names are only read and set.
        content = self._watched.content
        if content is self._for_grpc:
            return None
        self._for_grpc = content
        return _configuration(content)


class _Content(Struct, frozen=True):
    """What the files held at one time."""

    context: ssl.SSLContext
    certificate: bytes
    key: bytes
    roots: bytes | None

    @classmethod
    def of(cls, files: TlsFiles) -> _Content:
        return cls(
            server_context(files),
            pem.read("tls_certificate", files.certificate),
            pem.read("tls_key", files.key),
            pem.read("tls_client_ca", files.client_ca) if files.client_ca else None,
        )


def _configuration(content: _Content) -> Any:
    import grpc

    return grpc.ssl_server_certificate_configuration([(content.key, content.certificate)], content.roots)


def warn_of_modes(files: TlsFiles) -> None:
    """Say so if every user of this host may read the key."""
    if Path(files.key).stat().st_mode & _READ_BY_ALL:
        _log.warning("tls_key: every user of this host may read %s; chmod 600 it", files.key)


def _named(files: TlsFiles) -> list[tuple[str, str]]:
    pairs = [("tls_certificate", files.certificate), ("tls_key", files.key)]
    return [*pairs, ("tls_client_ca", files.client_ca)] if files.client_ca else pairs
