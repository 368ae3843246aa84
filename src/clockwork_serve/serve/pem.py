"""Certificates, keys and authorities in PEM files: read, checked, and named by their settings where wrong."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

from clockwork_serve.errors import ConfigError


def read(setting: str, path: str) -> bytes:
    """The file. Raises :class:`ConfigError` naming the setting, as all here do."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _wrong(setting, path, "a readable file", error.strerror or str(error)) from None


def load_chain(context: ssl.SSLContext, prefix: str, certificate: str, key: str) -> None:
    """What one shows to others; the settings are ``PREFIX_certificate`` and ``PREFIX_key``."""
    setting = f"{prefix}_key"
    if b"PRIVATE KEY-----" not in read(setting, key):
        raise _wrong(setting, key, "a private key in PEM form", "other content")
    try:
        context.load_cert_chain(certificate, key, password=_ask_nobody(setting, key))
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise _wrong(setting, key, f"the key of {certificate}", "another key") from None
        expected = "a certificate in PEM form and its key"
        raise _wrong(f"{prefix}_certificate", certificate, expected, words_of(error)) from None


def load_authorities(context: ssl.SSLContext, setting: str, path: str) -> None:
    """Who vouches for others; they must show a certificate from now on."""
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise _wrong(setting, path, "certificates of authorities in PEM form", words_of(error)) from None
    context.verify_mode = ssl.CERT_REQUIRED


def words_of(error: Exception) -> str:
    """What went wrong with a file or in a handshake, in a few words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    return str(error) or type(error).__name__


def _ask_nobody(setting: str, path: str) -> Callable[[], str]:
    def asked() -> str:
        # Else OpenSSL asks at the terminal, and a server waits there for ever.
        raise _wrong(setting, path, "a key without a passphrase", "one that is encrypted")

    return asked


def _wrong(setting: str, path: str, expected: str, found: str) -> ConfigError:
    return ConfigError(f"{setting}: expected {expected}; found {found} in {path}; name another file")
