"""TLS between our own machines: each side shows a certificate of one authority, or hears nothing.

It opens no socket. TLS 1.3, and no other.
"""

from __future__ import annotations

import logging
import ssl
from pathlib import Path
from typing import Final

from msgspec import Struct

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.gateway import tls as pem
from clockwork_serve.serve.gateway.tls import Watched

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
        pem.read(setting, path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([PROTOCOL_NAME])
    pem.load_chain(context, "cluster", files.certificate, files.key)
    # A client's name is checked by default (check_hostname), and nobody without a certificate gets further.
    pem.load_authorities(context, "cluster_ca", files.ca)
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
