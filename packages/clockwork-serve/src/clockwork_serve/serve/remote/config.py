"""Configuration of links between machines, for both sides, and its checks."""

from __future__ import annotations

import re
import socket
from typing import Final

from msgspec import Struct

from clockwork_serve.config import Settings
from clockwork_serve.config.table import split_address
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.remote.tls import ClusterFiles

FAR_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\.[a-z-]+:\d{1,4}")
"""The form of the name of a worker on another machine, which is also its device's. The names of the server's
own workers have no dot, so the two cannot collide."""


FAR_GATEWAY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\.gateway-\d{1,2}")
"""The form of the name of a gateway on another machine, which does not collide for the same reason."""


class BridgeConfig(Struct, frozen=True, kw_only=True):
    """The configuration of the bridge process. ``kinds``: those of the server's devices, as in profiles."""

    run_dir: str
    settings: Settings
    kinds: tuple[str, ...]


def cluster_files(settings: Settings) -> ClusterFiles:
    """The certificate and key of this machine, and the authority of all machines."""
    return ClusterFiles(
        certificate=settings.cluster_certificate, key=settings.cluster_key, ca=settings.cluster_ca
    )


def check_listening(settings: Settings) -> None:
    """Raise :class:`ConfigError` if a file or the port for other machines cannot be used."""
    cluster_files(settings).check("listen_machines")
    host, port = split_address(settings.listen_machines)
    try:
        bound(host, port).close()
    except OSError as error:
        raise ConfigError(
            f"listen_machines: expected an address of this machine and a free port; found {host}:{port}, not "
            f"to be had ({error.strerror or error}); choose another"
        ) from None


def check_joining(settings: Settings, joining: str) -> None:
    """Raise :class:`ConfigError` if a setting is missing that ``joining``, such as "a worker", needs."""
    if not settings.controller:
        raise ConfigError(
            "controller: expected HOST:PORT of a server that was started with --listen-machines; found none; "
            "give it with --controller"
        )
    cluster_files(settings).check(f"{joining} on another machine")


def bound(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)
