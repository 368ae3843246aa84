"""``clockwork gateway``: gateways of this machine for a server elsewhere.

It holds their ports and keeps them running, and serves nothing itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve import far_children
from clockwork_serve.serve.gateway_door import check_door
from clockwork_serve.serve.launches import gateway_launches
from clockwork_serve.serve.machine_config import FAR_GATEWAY, FarServer
from clockwork_serve.serve.ports import Ports, addresses
from clockwork_serve.serve.server_config import GatewaysConfig
from clockwork_serve.serve.supervisor import Launch

ENDING_S: Final = 1.0
"""For a gateway to end in, once it has drained."""


class FarGatewaysConfig(GatewaysConfig, frozen=True, kw_only=True):
    """``machine`` is what the server will call this one."""

    machine: str
    server: FarServer

    def __post_init__(self) -> None:
        """Check the name, too. Raises :class:`ConfigError`."""
        GatewaysConfig.__post_init__(self)
        if not FAR_GATEWAY.fullmatch(f"{self.machine}.gateway-0"):
            raise ConfigError(
                f"machine_name: expected a name such that a gateway is called NAME.gateway-0; found "
                f"{self.machine!r:.80}; give --machine-name"
            )


def run(config: FarGatewaysConfig, on_listening: Callable[[dict[str, str]], None] = lambda at: None) -> int:
    """As :func:`far_children.run`. ``on_listening`` is told the addresses once their ports are held.

    Raises :class:`ConfigError` for a port that is not to be had, or files of the door that will not do.
    """
    check_door(config.door, config.host)
    ports = Ports(config.host, config.ports)
    try:
        on_listening(addresses(config.host, ports.number_by_name, tls=config.door.tls is not None))

        def launches(run_dir: Path) -> list[Launch]:
            prefix = f"{config.machine}."
            return gateway_launches(config, run_dir, ports.number_by_name, config.server, prefix)

        return far_children.run(launches, config.drain_s + ENDING_S)
    finally:
        ports.close()
