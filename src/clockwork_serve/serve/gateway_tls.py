"""TLS for the gateways' ports: certificate files, checked, as what HTTP and gRPC want. It opens no socket."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from clockwork_serve.errors import ConfigError

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
        _read(setting, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    if b"PRIVATE KEY-----" not in _read("tls_key", files.key):
        raise _wrong("tls_key", files.key, "a private key in PEM form", "other content")
    try:
        context.load_cert_chain(files.certificate, files.key, password=_ask_nobody(files.key))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _wrong("tls_key", files.key, f"the key of {files.certificate}", "another key") from None
        raise _wrong(
            "tls_certificate", files.certificate, "a certificate in PEM form and its key", _words(error)
        ) from None
    if files.client_ca:
        try:
            context.load_verify_locations(files.client_ca)
        except ssl.SSLError as error:
            expected = "certificates of authorities in PEM form"
            raise _wrong("tls_client_ca", files.client_ca, expected, _words(error)) from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def grpc_credentials(files: TlsFiles) -> Any:
    """The same for gRPC, which speaks TLS 1.2 or later by itself."""
    import grpc

    pair = (_read("tls_key", files.key), _read("tls_certificate", files.certificate))
    roots = _read("tls_client_ca", files.client_ca) if files.client_ca else None
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=roots is not None)


def warn_of_modes(files: TlsFiles) -> None:
    """Say so if every user of this host may read the key."""
    if Path(files.key).stat().st_mode & _READ_BY_ALL:
        _log.warning("tls_key: every user of this host may read %s; chmod 600 it", files.key)


def _named(files: TlsFiles) -> list[tuple[str, str]]:
    pairs = [("tls_certificate", files.certificate), ("tls_key", files.key)]
    return [*pairs, ("tls_client_ca", files.client_ca)] if files.client_ca else pairs


def _read(setting: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _wrong(setting, path, "a readable file", error.strerror or str(error)) from None


def _ask_nobody(path: str) -> Callable[[], str]:
    def asked() -> str:
        # Else OpenSSL asks at the terminal, and a server waits there for ever.
        raise _wrong("tls_key", path, "a key without a passphrase", "one that is encrypted")

    return asked


def _wrong(setting: str, path: str, expected: str, found: str) -> ConfigError:
    return ConfigError(f"{setting}: expected {expected}; found {found} in {path}; name another file")


def _words(error: ssl.SSLError) -> str:
    return (error.reason or str(error)).replace("_", " ").lower()
