"""TLS for the gateways' ports: PEM files, validated, and reloaded when they change."""

from __future__ import annotations

import logging
import os
import ssl
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from msgspec import Struct

from clockwork_serve.errors import ConfigError

# ------------------------------------------------------------
# Certificates, keys and authorities in PEM files. Errors name the setting.


def read(setting: str, path: str) -> bytes:
    """The content of a file. Raises :class:`ConfigError` naming the setting, as all functions here do."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _wrong(setting, path, "a readable file", error.strerror or str(error)) from None


def load_chain(context: ssl.SSLContext, prefix: str, certificate: str, key: str) -> None:
    """Load our own certificate and key; the settings are ``PREFIX_certificate`` and ``PREFIX_key``."""
    setting = f"{prefix}_key"
    if b"PRIVATE KEY-----" not in read(setting, key):
        raise _wrong(setting, key, "a private key in PEM form", "other content")
    try:
        context.load_cert_chain(certificate, key, password=_refuse_passphrase(setting, key))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _wrong(setting, key, f"the key of {certificate}", "another key") from None
        expected = "a certificate in PEM form and its key"
        raise _wrong(f"{prefix}_certificate", certificate, expected, reason_of(error)) from None


def load_authorities(context: ssl.SSLContext, setting: str, path: str) -> None:
    """Require certificates of peers, signed by these authorities."""
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise _wrong(setting, path, "certificates of authorities in PEM form", reason_of(error)) from None
    context.verify_mode = ssl.CERT_REQUIRED


def reason_of(error: Exception) -> str:
    """A short reason for an error of a file or a handshake."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return str(error) or type(error).__name__


def _refuse_passphrase(setting: str, path: str) -> Callable[[], str]:
    def passphrase() -> str:
        # Otherwise OpenSSL prompts at the terminal, and the server blocks there.
        raise _wrong(setting, path, "a key without a passphrase", "one that is encrypted")

    return passphrase


def _wrong(setting: str, path: str, expected: str, found: str) -> ConfigError:
    return ConfigError(f"{setting}: expected {expected}; found {found} in {path}; name another file")


# ------------------------------------------------------------
# Files that are reloaded when they change; an invalid change leaves the last valid content in force.


REFRESH_S: Final = 2.0  # the interval between checks whether files changed

Content = TypeVar("Content")
_log = logging.getLogger(__name__)


class Watched(Generic[Content]):
    """``content`` is the result of ``read`` at the last successful load of the files. Not thread-safe."""

    def __init__(self, paths: Sequence[str], read: Callable[[], Content]) -> None:
        """Raises what ``read`` raises."""
        self._paths = paths
        self._read = read
        self._stamp = self._now()
        self._logged_error = ""
        self.content = read()

    def refresh(self) -> bool:
        """Load again if a file changed; whether there is new content.

        If a changed file is invalid, that is logged once, and the old content stays.
        """
        stamp = self._now()
        if stamp == self._stamp:
            return False
        try:
            self.content = self._read()
        except ConfigError as error:
            if str(error) != self._logged_error:
                self._logged_error = str(error)
                _log.error(
                    "%s; what it held before stays in force, but no gateway can start until it is mended",
                    error,
                )
            return False
        self._stamp = stamp
        self._logged_error = ""
        return True

    def _now(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(_stamp, self._paths))


def _stamp(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode


# ------------------------------------------------------------
# TLS of the gateways' ports, in the forms that HTTP and gRPC need.


class TlsFiles(Struct, frozen=True, kw_only=True):
    """Paths of PEM files: our certificate chain, its key, the authorities that sign clients' certificates.

    Without ``client_ca`` clients need no certificate.
    """

    certificate: str
    key: str
    client_ca: str = ""


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """The context for HTTP: TLS 1.2 or later. Raises :class:`ConfigError` naming the setting."""
    for setting, path in _named(files):
        read(setting, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    load_chain(context, "tls", files.certificate, files.key)
    if files.client_ca:
        load_authorities(context, "tls_client_ca", files.client_ca)
    return context


class Tls:
    """TLS for new connections: renewed files are used from the next handshake on."""

    def __init__(self, files: TlsFiles) -> None:
        """Raises :class:`ConfigError` naming the setting."""
        self._files = files
        self._watched = Watched([path for _, path in _named(files)], lambda: _Content.of(files))
        self._for_grpc = self._watched.content

    @property
    def context(self) -> ssl.SSLContext:
        """The current context, for HTTP."""
        return self._watched.content.context

    def grpc_credentials(self) -> Any:
        """Credentials for gRPC: TLS 1.2 or later; renewed files are fetched at each handshake."""
        import grpc

        return grpc.dynamic_ssl_server_credentials(
            _configuration(self._for_grpc), self._renewed, bool(self._files.client_ca)
        )

    def refresh(self) -> None:
        """Load the files again if they changed."""
        if self._watched.refresh():
            _log.info("tls_certificate: read %s again", self._files.certificate)

    def _renewed(self) -> Any:
        # Called by a thread of gRPC, which reads and sets both names without a lock.
        content = self._watched.content
        if content is self._for_grpc:
            return None
        self._for_grpc = content
        return _configuration(content)


class _Content(Struct, frozen=True):
    """The content of all files at one time."""

    context: ssl.SSLContext
    certificate: bytes
    key: bytes
    roots: bytes | None

    @classmethod
    def of(cls, files: TlsFiles) -> _Content:
        return cls(
            server_context(files), read("tls_certificate", files.certificate), read("tls_key", files.key),
            read("tls_client_ca", files.client_ca) if files.client_ca else None,
        )  # fmt: skip


def _configuration(content: _Content) -> Any:
    import grpc

    return grpc.ssl_server_certificate_configuration([(content.key, content.certificate)], content.roots)


def warn_of_mode(setting: str, path: str) -> None:
    """Warn if every user of this host may read a file of keys."""
    if Path(path).stat().st_mode & stat.S_IROTH:
        _log.warning("%s: every user of this host may read %s; chmod 600 it", setting, path)


def _named(files: TlsFiles) -> list[tuple[str, str]]:
    pairs = [("tls_certificate", files.certificate), ("tls_key", files.key)]
    return [*pairs, ("tls_client_ca", files.client_ca)] if files.client_ca else pairs
