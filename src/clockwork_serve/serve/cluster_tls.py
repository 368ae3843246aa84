"""TLS between our own machines: each side shows a certificate of one authority, or hears nothing.

It opens no socket. TLS 1.3, and no other.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec import Struct

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.gateway_watch import Watched

PROTOCOL_NAME: Final = "clockwork-1"
"""What both sides must want to speak: a TLS client that came by accident does not."""


_log = logging.getLogger(__name__)


class ClusterFiles(Struct, frozen=True, kw_only=True):
    """Paths of PEM files: this machine's certificate, its key, and the authority of all machines."""

    certificate: str = ""
    key: str = ""
    ca: str = ""

    def check(self, asked_by: str) -> None:
        """Raise :class:`ConfigError` unless all three are there and fit; ``asked_by`` is what needs them."""
        for setting, path in self.named().items():
            if not path:
                raise ConfigError(
                    f"{setting}: expected a PEM file, as {asked_by} needs a certificate, its key and the "
                    "authority that signed those of all machines; found none; name all three"
                )
        context_of(self, server=True)
        if Path(self.key).stat().st_mode & 0o004:
            _log.warning("cluster_key: every user of this host may read %s; chmod 600 it", self.key)

    def named(self) -> dict[str, str]:
        """The paths by setting."""
        return {"cluster_certificate": self.certificate, "cluster_key": self.key, "cluster_ca": self.ca}


def context_of(files: ClusterFiles, *, server: bool) -> ssl.SSLContext:
    """What one side of a connection wants of the other. Raises :class:`ConfigError` naming the setting."""
    for setting, path in files.named().items():
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise _wrong(setting, path, "a readable file", error.strerror or str(error)) from None
        if setting == "cluster_key" and b"PRIVATE KEY-----" not in content:
            raise _wrong(setting, path, "a private key in PEM form", "other content")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([PROTOCOL_NAME])
    try:
        context.load_cert_chain(files.certificate, files.key, password=_ask_nobody(files.key))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _wrong("cluster_key", files.key, f"the key of {files.certificate}", "another key") from None
        expected = "a certificate in PEM form and its key"
        raise _wrong("cluster_certificate", files.certificate, expected, words_of(error)) from None
    try:
        context.load_verify_locations(files.ca)
    except ssl.SSLError as error:
        expected = "certificates of authorities in PEM form"
        raise _wrong("cluster_ca", files.ca, expected, words_of(error)) from None
    # A client's name is checked by default (check_hostname), and nobody without a certificate gets further.
    context.verify_mode = ssl.CERT_REQUIRED
    return context


class ClusterContext:
    """The context as new connections get it: renewed files count from the next handshake on."""

    def __init__(self, files: ClusterFiles, *, server: bool) -> None:
        """Raises :class:`ConfigError` naming the setting."""
        self._watched = Watched(list(files.named().values()), lambda: context_of(files, server=server))

    def now(self) -> ssl.SSLContext:
        """What holds now."""
        self._watched.refresh()
        return self._watched.content


def words_of(error: Exception) -> str:
    """What went wrong in a handshake, in a few words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return str(error) or type(error).__name__


def _ask_nobody(path: str) -> Callable[[], str]:
    def asked() -> str:
        # Else OpenSSL asks at the terminal, and a server waits there for ever.
        raise _wrong("cluster_key", path, "a key without a passphrase", "one that is encrypted")

    return asked


def _wrong(setting: str, path: str, expected: str, found: str) -> ConfigError:
    return ConfigError(f"{setting}: expected {expected}; found {found} in {path}; name another file")
