"""What links between machines are told, on either side, and what they are checked for. It starts nothing."""

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
"""What a worker on another machine and its device are called, alike: no worker of the server's own has a dot
in its name, so none can be taken for another."""


FAR_GATEWAY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\.gateway-\d{1,2}")
"""What a gateway on another machine is called, for the same reason."""


class BridgeConfig(Struct, frozen=True, kw_only=True):
    """All that the process is told where workers and gateways on other machines join.

    ``kinds`` are those of the server's devices, as profiles name them.
    """

    run_dir: str
    settings: Settings
    kinds: tuple[str, ...]


def cluster_files(settings: Settings) -> ClusterFiles:
    """What this machine shows to others, and wants of them."""
    return ClusterFiles(
        certificate=settings.cluster_certificate, key=settings.cluster_key, ca=settings.cluster_ca
    )


def check_listening(settings: Settings) -> None:
    """Raise :class:`ConfigError` unless others may join, their files fit and the port is to be had."""
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
    """Raise :class:`ConfigError` unless ``joining``, such as a worker, has all to join a server elsewhere."""
    if not settings.controller:
        raise ConfigError(
            "controller: expected HOST:PORT of a server that was started with --listen-machines; found none; "
            "give it with --controller"
        )
    cluster_files(settings).check(f"{joining} on another machine")


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)
