"""Who may come in, and how: TLS, API keys and limits of a gateway, as settings and as what they become."""

from __future__ import annotations

import asyncio
import logging

import msgspec
from msgspec import Struct

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.gateway_keys import KeyRing, check_keys
from clockwork_serve.serve.gateway_limits import HttpLimits
from clockwork_serve.serve.gateway_regions import is_loopback
from clockwork_serve.serve.gateway_tls import Tls, TlsFiles, server_context, warn_of_modes
from clockwork_serve.serve.gateway_watch import REFRESH_S

_log = logging.getLogger(__name__)


class DoorConfig(Struct, frozen=True, kw_only=True):
    """Paths, empty for none. Without a certificate nothing is encrypted, without keys all may do all.

    ``body_bytes`` and ``arriving_bytes`` of the limits give way to what the gateway itself was told.
    """

    tls_certificate: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    api_keys: str = ""
    limits: HttpLimits = HttpLimits()

    def __post_init__(self) -> None:
        """Check that what belongs together is there. Raises :class:`ConfigError`."""
        files = {"tls_certificate": self.tls_certificate, "tls_key": self.tls_key}
        missing = [name for name, path in files.items() if not path]
        if missing and (len(missing) == 1 or self.tls_client_ca):
            raise ConfigError(
                f"{missing[0]}: expected a PEM file, as TLS needs a certificate and its key; found none; "
                "name both, or no file of TLS at all"
            )

    @property
    def tls(self) -> TlsFiles | None:
        """The files of TLS, if it is on."""
        if not self.tls_certificate:
            return None
        return TlsFiles(certificate=self.tls_certificate, key=self.tls_key, client_ca=self.tls_client_ca)


class Door:
    """What a gateway's servers share. Without ``keys`` everybody may do everything."""

    def __init__(self, config: DoorConfig, body_bytes: int, region_bytes: int) -> None:
        """Raises :class:`ConfigError` for a file that will not do."""
        self.limits = msgspec.structs.replace(
            config.limits, body_bytes=body_bytes, arriving_bytes=region_bytes
        )
        self.keys = KeyRing(config.api_keys) if config.api_keys else None
        self.tls = None if config.tls is None else Tls(config.tls)

    async def keep_fresh(self) -> None:
        """Read files again when they change, for ever."""
        while self.keys is not None or self.tls is not None:
            await asyncio.sleep(REFRESH_S)
            if self.keys is not None:
                self.keys.refresh()
            if self.tls is not None:
                self.tls.refresh()


def check_door(config: DoorConfig, host: str) -> None:
    """Check all files before anything is started, and tell what is open to whom.

    Raises :class:`ConfigError`.
    """
    if config.tls is not None:
        server_context(config.tls)
        warn_of_modes(config.tls)
    if config.api_keys:
        check_keys(config.api_keys)
    if host == "localhost" or is_loopback(host):
        return
    if not config.api_keys and not config.tls_client_ca:
        _log.warning(
            "host: listening on %s, and whoever reaches it may do everything; "
            "name a file of API keys with api_keys", host,
        )  # fmt: skip
    elif config.tls is None:
        _log.warning(
            "host: listening on %s without TLS, so API keys can be read on their way; set tls_certificate "
            "and tls_key, or let a proxy in front of it encrypt", host,
        )  # fmt: skip
