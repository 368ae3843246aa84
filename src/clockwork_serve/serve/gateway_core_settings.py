"""What the core of a gateway is told when it starts."""

from __future__ import annotations

from msgspec import Struct

from clockwork_serve.units import MIB


class GatewaySettings(Struct, frozen=True, kw_only=True):
    """What the core of a gateway needs to know. ``controller`` is the path of the controller's socket.

    ``triton_codes``: what is refused or expired gets Triton's status. No more than ``requests`` may be open.
    """

    name: str
    controller: str
    region_bytes: int = 256 * MIB
    default_slo_ns: int | None = None
    triton_codes: bool = False
    requests: int = 20_000
