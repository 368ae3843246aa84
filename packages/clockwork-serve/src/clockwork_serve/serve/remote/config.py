"""Settings of links between machines, for either side; they start nothing."""

from __future__ import annotations

import re
import socket
from typing import Final

from msgspec import Struct

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.remote.link import SILENCE_S
from clockwork_serve.serve.remote.tls import ClusterFiles
from clockwork_serve.units import MIB

FAR_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\.[a-z-]+:\d{1,4}")
"""What a worker on another machine and its device are called, alike: no worker of the server's own has a dot
in its name, so none can be taken for another."""


FAR_GATEWAY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\.gateway-\d{1,2}")
"""What a gateway on another machine is called, for the same reason."""


class BridgeSettings(Struct, frozen=True, kw_only=True):
    """Where workers and gateways on other machines may join.

    A link that says nothing for ``silence_s`` is lost. ``region_bytes`` hold the tensors of each of these
    gateways' requests in flight.
    """

    host: str
    port: int
    files: ClusterFiles
    silence_s: float = SILENCE_S
    region_bytes: int = 256 * MIB

    def check(self) -> None:
        """Raise :class:`ConfigError` unless the files fit and the port is to be had."""
        self.files.check("listen_machines")
        try:
            bound(self.host, self.port).close()
        except OSError as error:
            raise ConfigError(
                f"listen_machines: expected an address of this machine and a free port; found "
                f"{self.host}:{self.port}, not to be had ({error.strerror or error}); choose another"
            ) from None


class FarServer(Struct, frozen=True, kw_only=True):
    """Where the server is that a process of another machine joins, and what it shows to be let in."""

    host: str
    port: int
    files: ClusterFiles
    silence_s: float = SILENCE_S


class MachineConfig(FarServer, frozen=True, kw_only=True):
    """What a worker needs beside that.

    ``cache_dir`` is on the worker's machine; ``kinds`` are those of its devices, as profiles name them.
    """

    cache_dir: str
    kinds: tuple[str, ...]
    region_bytes: int = 512 * MIB


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)
